"""The loss of the head: the loss and gradients of torch's own, whatever the size of the chunks, and no more memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statefeed import native as kernels
from statefeed.lm.model import head

N, H, V = 23, 5, 17


@pytest.fixture(autouse=True, params=["fused", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What makes the loss: the fused kernel or torch."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip("the kernels cannot be built here")
    return str(request.param)


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, bias = (3 * torch.randn(*shape, dtype=dtype) for shape in ((N, H), (V, H), (V,)))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), torch.randint(V, (N,))


@pytest.mark.parametrize("rows", [1, 4, 22, 23, 100])
def test_loss_and_gradients_are_those_of_all_logits_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.LOGITS, "cpu", rows * V)
    x, weight, bias, targets = arguments()
    found = head.cross_entropy_sum(x, weight, bias, targets)
    expected = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(head.cross_entropy_sum(x, weight, bias, targets), expected)
    grads = torch.autograd.grad(found / 7, (x, weight, bias))
    torch.testing.assert_close(grads, torch.autograd.grad(expected / 7, (x, weight, bias)))


def test_gradients_are_those_of_finite_differences() -> None:
    x, weight, bias, targets = arguments(torch.float64)
    assert torch.autograd.gradcheck(lambda *a: head.cross_entropy_sum(*a, targets), (x, weight, bias))


def test_no_target_costs_nothing() -> None:
    x, weight, bias, targets = arguments()
    found = head.cross_entropy_sum(x[:0], weight, bias, targets[:0])
    assert found.item() == 0
    assert torch.autograd.grad(found, weight)[0].abs().max() == 0


def test_a_row_whose_logits_are_far_apart_has_a_finite_loss() -> None:
    x, weight, bias, targets = arguments()
    found = head.cross_entropy_sum(1e4 * x.detach(), weight, bias, targets)
    assert torch.isfinite(found)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(found, (weight, bias)))


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_products_are_bf16_and_sums_float32(training: bool) -> None:
    x, weight, bias, targets = arguments()
    expected = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        found = head.cross_entropy_sum(x, weight, bias, targets)
        assert found.dtype == torch.float32
        assert found.item() != expected.item()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    if training:
        for grad, exact in zip(
            torch.autograd.grad(found, (x, weight, bias)), torch.autograd.grad(expected, (x, weight, bias)), strict=True
        ):
            assert grad.dtype == torch.float32
            assert (grad - exact).norm() < 0.03 * exact.norm()


def test_all_logits_never_exist_at_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that torch sees on the way is no larger than a chunk of logits or an argument."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for part in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(part, Tensor):
                    largest = max(largest, part.numel())
            return result

    x, weight, bias = torch.randn(500, 4).requires_grad_(), torch.randn(40, 4).requires_grad_(), torch.zeros(40)
    targets = torch.randint(40, (500,))
    monkeypatch.setitem(head.LOGITS, "cpu", 50 * 40)
    with Watch():
        head.cross_entropy_sum(x, weight, bias.requires_grad_(), targets).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            head.cross_entropy_sum(x, weight, bias, targets)
    assert largest == 2000 == x.numel()
