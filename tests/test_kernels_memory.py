"""Memory reused from step to step: never while a tensor uses it, and never for what the user gets."""

import contextlib
import copy
import io

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import statefeed as sf
from statefeed import native
from statefeed.native import memory

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")


def results() -> list[Tensor]:
    """All that a user gets of one step, each large enough for reused memory."""
    model = sf.GRU(160, 160)
    x = torch.randn(64, 16, 160, requires_grad=True)
    y, _ = model(x)
    y.sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.dim() > 1)]


def test_memory_is_reused_but_never_while_a_tensor_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "blocks", [])  # none that earlier tests left idle
    like = torch.empty(0)
    first = memory.empty(1000, 1000, like).fill_(1)
    place, view = first.data_ptr(), first[3:]
    del first
    assert memory.empty(1000, 1000, like).data_ptr() != place
    del view
    assert memory.empty(1000, 1000, like).data_ptr() == place


def test_results_are_ordinary_tensors() -> None:
    for tensor in results():
        expected, file = tensor.clone(), io.BytesIO()
        torch.save(tensor, file)
        file.seek(0)
        assert torch.equal(torch.load(file), expected)
        assert torch.equal(copy.deepcopy(tensor), expected)
        assert torch.equal(tensor.clone().share_memory_(), expected)
        assert tensor.mul_(2).numel() == expected.numel()
        assert tensor.resize_(2 * expected.numel()).numel() == 2 * expected.numel()


def test_no_step_writes_into_what_an_earlier_one_returned() -> None:
    steps = [results() for _ in range(3)]
    expected = [[tensor.clone() for tensor in step] for step in steps]
    results()
    assert all(
        torch.equal(a, b) for step, same in zip(steps, expected, strict=True) for a, b in zip(step, same, strict=True)
    )


def test_idle_memory_does_not_grow() -> None:
    model, x = sf.GRU(160, 160), torch.randn(64, 16, 160)
    optimizer = torch.optim.Adam(model.parameters())
    sizes = []
    for _ in range(5):
        optimizer.zero_grad(set_to_none=False)
        model(x)[0].sum().backward()
        optimizer.step()
        sizes.append(sum(map(len, memory.blocks)))
    assert sizes[1:] == sizes[:1] * 4


@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors_have_no_memory(inside: bool) -> None:
    with FakeTensorMode() as mode:
        layer, x = sf.GRU(64, 256), torch.randn(200, 64, 64)
    with mode if inside else contextlib.nullcontext():
        y = layer(x)[0]
        y.sum().backward()
    assert isinstance(y, FakeTensor)
    assert isinstance(layer.weight_hh_l0.grad, FakeTensor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo itself
def test_a_compiled_large_layer_has_equal_gradients() -> None:
    model = sf.GRU(128, 128, feedback="gate+1")

    def gradients(run: torch.nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, 64 * 32 * 128).view(64, 32, 128).requires_grad_()
        y, h = run(x)
        return list(torch.autograd.grad(y.sin().sum() + h.sum(), [x, *model.parameters()]))

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients(compiled), gradients(model), strict=True))
