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


@pytest.mark.usefixtures("no_blocks")
def test_memory_is_reused_but_never_while_a_tensor_uses_it() -> None:
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


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the blocks that earlier tests left idle."""
    monkeypatch.setattr(memory, "blocks", [])


@pytest.mark.usefixtures("no_blocks")
def test_a_large_model_reuses_all_its_blocks_in_every_step() -> None:
    like, places = torch.empty(0), []
    for _ in range(12):
        saved = [memory.empty(1024, 2048, like) for _ in range(20)]  # 160 MiB, which nobody writes
        place = {tensor.data_ptr() for tensor in saved}
        for _ in range(20):  # one residual per layer, after which its saved values are freed
            residual = memory.empty(1024, 1024, like)
            place.add(residual.data_ptr())
            saved.pop()
        del residual
        places.append(place)
    assert places[1:] == places[:1] * 11


@pytest.mark.usefixtures("no_blocks")
def test_blocks_that_training_no_longer_requests_are_freed() -> None:
    like = torch.empty(0)
    several = [memory.empty(1024, 1024, like) for _ in range(24)]
    assert len(memory.blocks) == 24
    del several
    for _ in range(4 * 24 + 5):
        last = memory.empty(1024, 1024, like)
    assert [len(block) for block in memory.blocks] == [last.nbytes] * 2  # one of them in use


@pytest.mark.usefixtures("no_blocks")
def test_small_requests_free_large_blocks_too() -> None:
    like = torch.empty(0)
    memory.empty(1024, 1024, like)
    for _ in range(8 * 64 + 4):
        assert memory.empty(128, 128, like).nbytes == (4 << 20) // 64
    assert not memory.blocks


@pytest.mark.usefixtures("no_blocks")
def test_inference_frees_the_blocks_of_training() -> None:
    layer, x = sf.GRU(16, 128, feedback="dsf"), torch.randn(64, 128, 16)
    graphs = [layer(x)[0] for _ in range(3)]
    graphs[0].sum().backward()
    del graphs
    assert len(memory.blocks) >= 3
    with torch.no_grad():
        for _ in range(4 * len(memory.blocks) + 2):
            layer(x)
    assert not memory.blocks


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
@pytest.mark.compiles
def test_a_compiled_large_layer_has_equal_gradients() -> None:
    model = sf.GRU(128, 128, feedback="gate+1")

    def gradients(run: torch.nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, 64 * 32 * 128).view(64, 32, 128).requires_grad_()
        y, h = run(x)
        return list(torch.autograd.grad(y.sin().sum() + h.sum(), [x, *model.parameters()]))

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients(compiled), gradients(model), strict=True))
