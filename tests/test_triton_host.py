"""Host side of the GPU passes: no synchronization, one precision setting, the right device, little Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from statefeed.backends import BACKENDS, Problem, Upstream
from statefeed.backends.triton import backward as backward_module
from statefeed.backends.triton import cudnn, host, precision, recompute
from statefeed.backends.triton.cells import CELLS as KERNELS
from statefeed.backends.triton.rules import RULES
from statefeed.cells import CELLS as TABLE
from statefeed.feedback import KernelRule
from statefeed.layout import Layout
from statefeed.native import triton_probe
from statefeed.scan import chunks
from statefeed.scan.triton import device_of

BACKEND = BACKENDS["triton"]
aten = torch.ops.aten

# Synchronization ------------------------------------------------------------------------------------------------------


class NoSynchronization(TorchDispatchMode):
    """Raise for an operator with a CPU tensor or a read of a value; meta tensors replace device tensors."""

    READS = (aten.lift_fresh, aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.READS, f"{func} waits for the device or copies from the host"
        found = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in torch.utils._pytree.tree_leaves((args, kwargs, found)) if torch.is_tensor(t)}
        assert devices <= {"meta"}, f"{func} has tensors on {devices}"
        return found


class NoHostData(TorchFunctionMode):
    """Raise for copies from Python values to the device: tensors of numbers, and lists as an index."""

    MAKES = (torch.tensor, torch.as_tensor, Tensor.new_tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.MAKES, f"{func} copies from the host"
        if func is Tensor.__getitem__:
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(key, list | range) for key in keys), "an index is copied from the host"
        return func(*args, **(kwargs or {}))


CELLS = {name: TABLE[name] for name in KERNELS}


def problem(cell: str, device: str, packed: bool = False, reverse: bool = False) -> tuple[Problem, Upstream]:
    this, N = CELLS[cell], 6 if packed else 8

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    P = 2 if this.projects else 8
    layout = Layout(4, 2, torch.tensor([2, 2, 1, 1]) if packed else None)
    state = tuple(zeros(2, width) for width in this.state_widths(8, P))
    weights = tuple(zeros(*shape) for shape in this.weight_shapes(3, 8, P).values())
    found = Problem(this, zeros(N, 3), state, weights, layout, reverse)
    return found, Upstream(zeros(N, P), tuple(torch.zeros_like(s) for s in state))


@contextmanager
def implementations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the implementations of the operators on meta tensors, for which the dispatcher would run their fakes."""
    with monkeypatch.context() as patch:
        for name, function in (
            ("triton_recompute", recompute.recompute),
            ("triton_backward", backward_module.backward),
            ("triton_mean_jacobian", backward_module.mean_jacobian),
            ("cudnn_layer", cudnn.run_layer),
        ):
            getattr(torch.ops.statefeed, name)  # after the first lookup it is an attribute, which can be patched
            patch.setattr(torch.ops.statefeed, name, function)
        yield


def one_step(cell: str, rule: str, corrections: int, packed: bool, reverse: bool) -> Callable[[], Any]:
    """Forward and backward of one layer on meta tensors."""
    p, upstream = problem(cell, "meta", packed, reverse)
    S, N = sum(p.sizes), len(p.x)
    shape = {"stationary": (S,), "per_row": (N, S)}.get(rule)
    D = None if shape is None else torch.zeros(shape, device="meta")
    p.layout.offsets(p.x.device)  # of a packed batch, copied once for all layers and passes

    def recomputed() -> Any:
        problems = [p._replace(reverse=False), p] if reverse else [p]
        return BACKEND.recompute(p, BACKEND.forward(problems, True)[-1])

    # A loop over time reads the sizes of packed steps on the CPU.
    from_loop = recomputed() if CELLS[cell].torch_forward is None else None

    def run() -> Any:
        done = from_loop or recomputed()
        mean = BACKEND.mean_jacobian(p, done)
        return mean, BACKEND.backward(p, done, upstream, KernelRule(rule, D, corrections), True)

    return run


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rule", RULES)
def test_no_pass_waits_for_the_device(cell: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(x: Tensor, *rest: Any) -> Any:  # cuDNN's, dense or packed
        packed = torch.is_tensor(rest[0]) and rest[0].dtype == torch.int64
        hx, bidirectional = rest[packed], rest[-1 if packed else -2]
        states = [hx] if torch.is_tensor(hx) else hx
        width = states[0].shape[-1] * (2 if bidirectional else 1)
        return x.new_empty((*x.shape[:-1], width)), *(s.new_empty(s.shape) for s in states)

    if CELLS[cell].torch_forward is not None:
        monkeypatch.setattr(torch._VF, CELLS[cell].torch_forward, outputs)
    monkeypatch.setattr(chunks, "steps", lambda *_: 2)
    for corrections, packed, reverse in ((0, False, False), (1, True, True), (1, False, True), (0, True, False)):
        run = one_step(cell, rule, corrections, packed, reverse)
        with host.without_launches(), implementations(monkeypatch), NoHostData(), NoSynchronization():
            mean, gradients = run()
        assert mean.is_meta
        assert gradients.x.shape == (6 if packed else 8, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda total: total[[0, 1, 3]],
        lambda total: total[0, 0].item(),
        lambda total: total.new_tensor([1.0]),
        lambda total: total[torch.tensor([0, 1])],
        lambda total: total + torch.ones(3).to("meta"),
        lambda total: total[total > 0],
        lambda total: total.cpu(),
    ],
)
def test_synchronizations_are_found(wrong: Callable[[Tensor], Any]) -> None:
    total = torch.zeros(4, 3, device="meta")
    with NoHostData(), NoSynchronization():
        total[:3] + total[1:]
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            wrong(total)


# Precision ------------------------------------------------------------------------------------------------------------


def settings() -> dict[str, str]:
    """The value of every getter of torch, or "raises": old getters raise if the old and new settings disagree."""
    getters: dict[str, Callable[[], Any]] = {
        "matmul": lambda: torch.backends.cuda.matmul.fp32_precision,
        "allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision,
        "rnn": lambda: torch.backends.cudnn.rnn.fp32_precision,
        "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
        "oneDNN": lambda: torch.backends.mkldnn.matmul.fp32_precision,
        "all": lambda: torch.backends.fp32_precision,
    }
    found = {}
    for name, get in getters.items():
        try:
            found[name] = str(get())
        except RuntimeError:
            found[name] = "raises"
    return found


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert "raises" not in settings().values()


@pytest.mark.parametrize("before", ["as shipped", "highest", "high", "medium", "old switch", "new switch", "new ieee"])
@pytest.mark.parametrize("wanted", ["tf32", "ieee", ""])
@pytest.mark.usefixtures("restored")
def test_no_getter_raises_inside_or_after(before: str, wanted: str) -> None:
    if before in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(before)
    elif before == "old switch":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif before.startswith("new"):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if before == "new switch" else "ieee"
    at_first = settings()
    with precision.matmul_precision(wanted):
        inside = settings()
    assert (inside["matmul"] == "tf32") == (wanted in ("tf32", ""))
    assert settings() == at_first
    for name, value in at_first.items():
        assert value == "raises" or inside[name] != "raises"


class Products(TorchDispatchMode):
    """Records the precision in which every product runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_, aten.bmm):
            self.found.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.torch_forward is not None])
@pytest.mark.parametrize("forward", ["tf32", "ieee"])
@pytest.mark.usefixtures("restored")
def test_the_backward_pass_follows_the_precision_of_the_forward_pass(
    cell: str, forward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, upstream = problem(cell, "cpu")
    torch.backends.cudnn.rnn.fp32_precision = forward
    done = BACKEND.forward([p], True)[0]
    torch.backends.cudnn.rnn.fp32_precision = "ieee" if forward == "tf32" else "tf32"
    with host.without_launches(), implementations(monkeypatch), Products() as products:
        BACKEND.backward(p, BACKEND.recompute(p, done), upstream, KernelRule("jacobian", None, 1), True)
    assert len(products.found) >= 4
    assert {value == "tf32" for value in products.found} == {forward == "tf32"}


@pytest.mark.parametrize("setting", ["high", "highest"])
@pytest.mark.usefixtures("restored")
def test_the_products_of_a_loop_run_in_torchs_own_precision(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    torch.backends.cudnn.rnn.fp32_precision = "ieee" if setting == "high" else "tf32"
    p, upstream = problem("slstm", "cpu")
    with host.without_launches(), Products() as products:
        done = BACKEND.recompute(p, BACKEND.forward([p], True)[0])
        BACKEND.backward(p, done, upstream, KernelRule("jacobian", None, 1), True)
    assert len(products.found) >= 4
    assert {value == "tf32" for value in products.found} == {setting == "high"}


# Devices --------------------------------------------------------------------------------------------------------------


def test_launches_go_to_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))).idx == 1
    inside, launches = [], []

    @contextmanager
    def guard(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    for module in (recompute, backward_module):
        monkeypatch.setattr(module, "device_of", guard)
    monkeypatch.setattr("statefeed.scan.triton.device_of", guard)
    kind = type(triton_probe.write_one)
    monkeypatch.setattr(kind, "run", lambda *_args, **_kwargs: launches.append(bool(inside)))
    for cell in CELLS:
        p, upstream = problem(cell, "cpu")
        done = BACKEND.recompute(p, BACKEND.forward([p], True)[0])
        BACKEND.mean_jacobian(p, done)
        BACKEND.backward(p, done, upstream, KernelRule("jacobian"), True)
    torch.ops.statefeed.triton_scan(torch.zeros(3, 2), torch.zeros(2), None, False)
    assert len(launches) > 10
    assert all(launches)


def test_a_probe_launches_a_kernel_and_names_the_cause_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    if not torch.cuda.is_available():
        assert triton_probe.probe(cpu).startswith("Triton ")
    with host.without_launches(), pytest.raises(RuntimeError, match="wrote 0, expected 1"):
        triton_probe.probe(cpu)

    def fails(*_args: Any, **_kwargs: Any) -> None:
        raise FileNotFoundError("gcc is not there\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(type(triton_probe.write_one), "run", fails)
        with pytest.raises(RuntimeError, match=r"could not be launched.*gcc is not there.*C compiler") as caught:
            triton_probe.probe(cpu)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    with pytest.raises(RuntimeError, match=r"capability 8\.0 or higher, an old GPU has 7\.5"):
        triton_probe.probe(torch.device("cuda", 0))


# Sizes and time -------------------------------------------------------------------------------------------------------


def test_cells_have_the_sizes_of_their_python_cells() -> None:
    assert set(KERNELS) <= set(TABLE)
    for name, cell in CELLS.items():
        kernels = KERNELS[name]
        assert (kernels.states, kernels.gates, kernels.shared_gates) == (
            cell.gradient_parts, cell.gates, cell.shared_gates,
        )  # fmt: skip
        assert kernels.projects == cell.projects
        assert kernels.from_states == (cell.torch_forward is None)


def test_the_time_of_python_can_be_measured() -> None:
    """The time is not bounded, because it depends on the load of the machine."""
    assert host.microseconds("rnn_tanh", "stationary", repeats=3) > 0
