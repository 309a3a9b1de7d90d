"""The fused loss of a head against all logits at once in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statefeed import native
from statefeed.native import head

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")

SHAPES = [(1, 1, 1), (5, 3, 7), (48, 16, 32), (50, 17, 33), (385, 20, 600), (800, 65, 1031)]


def arguments(N: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(N + H + V)
    x, weight, bias = (torch.randn(*shape, generator=make) for shape in ((N, H), (V, H), (V,)))
    return x, 2 * weight / H**0.5, bias, torch.randint(V, (N,), generator=make)


def exact(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> dict[str, Tensor]:
    upcast = [t.double().requires_grad_() for t in (x, weight, bias)]
    losses = F.cross_entropy(F.linear(*upcast), targets, reduction="none")
    grads = torch.autograd.grad(losses.sum(), upcast)
    return dict(zip(("losses", "x", "weight", "bias"), (losses.detach(), *grads), strict=True))


def found(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, bf16: bool = False) -> dict[str, Tensor]:
    """Into memory full of NaN."""
    outputs = [torch.full_like(t, float("nan")) for t in (x[:, 0], x, weight, bias)]
    torch.ops.statefeed.head_loss(bf16, x, weight, bias, targets, *outputs)
    return dict(zip(("losses", "x", "weight", "bias"), outputs, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("bf16", "allowed"), [(False, 5e-6), (True, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_those_of_all_logits_at_once(
    shape: tuple[int, int, int], bf16: bool, allowed: float, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = found(*arguments(*shape), bf16)
        again = found(*arguments(*shape), bf16)
        alone = head.losses(*arguments(*shape), bf16)
    finally:
        torch.set_num_threads(before)
    for name, truth in exact(*arguments(*shape)).items():
        scale = float(truth.abs().max()) or 1.0
        assert float((result[name] - truth).abs().max()) <= allowed * scale, name
        assert torch.equal(result[name], again[name]), name
    torch.testing.assert_close(alone, result["losses"])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(found(*arguments(800, 65, 1031)))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_no_row_leaves_gradients_of_zero() -> None:
    result = found(*arguments(0, 5, 7))
    assert all(result[name].abs().sum() == 0 for name in ("weight", "bias"))


def test_logits_far_below_zero_are_accurate() -> None:
    x, weight, bias, targets = arguments(20, 5, 19)  # the last vector of a row is partly outside
    result, truth = found(x, weight, bias - 500, targets), exact(x, weight, bias.double() - 500, targets)
    for name in truth:
        torch.testing.assert_close(result[name].double(), truth[name], rtol=1e-3, atol=1e-4)


def test_a_nan_logit_makes_the_loss_of_its_row_nan() -> None:
    x, weight, bias, targets = arguments(20, 5, 19)
    x[3, 1] = float("nan")
    losses = found(x, weight, bias, targets)["losses"]
    assert losses.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_target_outside_the_classes_is_named(wrong: int) -> None:
    x, weight, bias, targets = arguments(5, 3, 7)
    targets[2] = wrong
    with pytest.raises(IndexError, match=f"7 classes, got {wrong}"):
        head.losses(x, weight, bias, targets)


def test_the_operator_passes_opcheck() -> None:
    outputs = [torch.zeros(5), torch.zeros(5, 3), torch.zeros(7, 3), torch.zeros(7)]
    torch.library.opcheck(torch.ops.statefeed.head_loss.default, (False, *arguments(5, 3, 7), *outputs))
