"""Every launch of the GPU kernels in Triton's interpreter, with programs in random order: bounds and races."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from interpreter_checks import checked  # noqa: E402

from statefeed.backends.triton import host  # noqa: E402
from statefeed.backends.triton.backward import backward  # noqa: E402
from statefeed.backends.triton.cells import CELLS  # noqa: E402
from statefeed.backends.triton.recompute import recompute  # noqa: E402
from statefeed.backends.triton.rules import RULES  # noqa: E402
from statefeed.scan import chunks  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter records every access")


@triton.jit
def _planted(x, y, n, ERROR: tl.constexpr):
    lane = tl.program_id(0) * 4 + tl.arange(0, 4)
    mask = lane < n
    value = tl.load(x + 2 * lane if ERROR == "gap" else x + lane, mask, 0)
    if ERROR == "bounds":
        value += tl.load(x + lane + 1, mask, 0)
    if ERROR == "gap":
        value += tl.load(x + 2 * lane + 1, mask, 0)
    if ERROR == "read after write":
        tl.store(y + lane, value, mask)
        value = tl.load(y + lane, mask, 0)
    elif ERROR == "twice":
        tl.store(y + lane // 2, value, mask)
    elif ERROR == "two programs":
        tl.store(y + lane % 4, value, mask)
    elif ERROR == "neighbor":
        value += tl.load(y + (lane + 4) % n, mask, 0)
        tl.store(y + lane, value, mask)
    else:
        tl.store(y + lane, value, mask)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("bounds", "out of bounds"),
        ("gap", "out of bounds: between"),
        ("read after write", "reads what this launch wrote"),
        ("twice", "written twice"),
        ("two programs", "written twice"),
        ("neighbor", "one program writes what another reads|reads what this launch wrote"),
        ("none", ""),
    ],
)
def test_planted_errors_are_found(error: str, message: str) -> None:
    x, y, n = torch.arange(8.0), torch.zeros(8), 8
    if error == "gap":  # the elements between are no argument
        x, n = x[::2], 2

    def launch() -> None:
        with checked(0):
            _planted[(2,)](x, y, n, ERROR=error)

    if error == "none":
        launch()
        assert torch.equal(y, x)
        return
    with pytest.raises(Exception, match=message):
        launch()


def problem(cell: str, packed: bool, dtype: torch.dtype = torch.float64, H: int = 3) -> dict[str, Any]:
    """Rows of one layer; y and e are strided, like one direction of a bidirectional layer."""
    make, this, I = torch.Generator().manual_seed(0), CELLS[cell], 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

    sizes = torch.tensor([3, 3, 2, 2, 1]) if packed else None
    N, P = 11 if packed else 15, 2 if this.projects else H
    columns = 1 if this.from_states else P  # of W_hh: three heads of one unit
    widths = (P, *(H,) * (this.states - 1))
    projection = [normal(P, H)] if this.projects else []
    return {
        "x": normal(N, I), "y": normal(N, 2 * P)[:, P:].tanh(), "e": normal(N, 2 * P)[:, :P],
        "state": [normal(3, width) for width in widths],
        "final": [normal(3, width) for width in widths],
        "weights": [*(normal(this.gates * H, *rest) for rest in ((I,), (columns,), (), ())), *projection],
        "offsets": None if sizes is None else F.pad(sizes.cumsum(0), (1, 0)),
        "D": {"stationary": normal(sum(widths)), "per_row": normal(N, sum(widths))},
    }  # fmt: skip


def run(cell: str, rule: str, p: dict[str, Any], corrections: int, reverse: bool) -> list[Tensor]:
    operators = torch.ops.statefeed
    fixed = (p["x"], p["y"], p["state"], p["weights"])
    saved = host.recomputed(cell, *fixed, p["offsets"], reverse, "ieee")
    mean = operators.triton_mean_jacobian(cell, *saved, p["y"], p["weights"][1], 3, p["offsets"])
    found = operators.triton_backward(
        cell, rule, *saved, *fixed, [p["e"], *p["final"]], p["D"].get(rule), p["offsets"], corrections, reverse, True,
        "ieee",
    )  # fmt: skip
    return [mean, *found]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("steps", [2, 100])
def test_launches_of_a_layer(cell: str, packed: bool, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "steps", lambda *_: steps)
    # Blocks of four lanes, so that there are several programs over units too.
    monkeypatch.setattr(
        chunks, "launch", lambda T, lanes, like: chunks.Launch(4, steps, (-(-lanes // 4), -(-T // steps)))
    )
    p = problem(cell, packed)
    for seed, rule in enumerate(RULES):
        corrections, reverse = seed % 2, (seed // 2 % 2 == 1) != packed
        with checked(seed) as checker:  # the checked run is first: an access out of bounds must not run unchecked
            found = run(cell, rule, p, corrections, reverse)
        expected = run(cell, rule, p, corrections, reverse)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (
            "the result depends on the order of programs"
        )
        assert checker.programs > 2 * checker.launches > 0


class Products(TorchDispatchMode):
    """Counts the elements of tensors with N rows that torch's operators read and write."""

    # Views, new memory, and operators of the interpreter and its checks.
    SILENT = (
        "view",
        "slice",
        "t",
        "permute",
        "transpose",
        "empty",
        "new_empty",
        "set_",
        "as_strided",
        "detach",
        "alias",
    )

    def __init__(self, N: int) -> None:
        super().__init__()
        self.N, self.elements = N, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if str(func).split(".")[1] not in self.SILENT:
            tensors = [*tree_leaves(args), *tree_leaves(found)]
            self.elements += sum(t.numel() for t in tensors if torch.is_tensor(t) and self.N in t.shape)
        return found


@pytest.mark.parametrize(("cell", "expected"), [("gru", 34), ("lstm", 35), ("rnn_tanh", 11)])
def test_memory_accesses_of_a_backward_pass(cell: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/scaling.md: one tensor is N * H values, x has as many, time is in one chunk."""
    H, N, this = 4, 252, CELLS[cell]
    monkeypatch.setattr(chunks, "steps", lambda T, *_: T)
    x, y, e = (torch.rand(N, H) for _ in range(3))
    state = [torch.rand(4, H) for _ in range(this.states)]
    weights = [torch.rand(this.gates * H, *columns) for columns in ((H,), (H,), (), ())]
    D = torch.rand(this.states * H)
    with checked(0) as checker, Products(N) as products:
        saved = recompute(cell, x, y, state, weights, None, False, "ieee")
        backward(cell, "stationary", *saved, x, y, state, weights, [e, *state], D, None, 0, False, True, "ieee")
    assert (products.elements + checker.accesses) / (N * H) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("varying", [False, True])
def test_launches_of_a_scan(reverse: bool, varying: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "launch", lambda T, lanes, like: chunks.Launch(4, 2, (-(-lanes // 4), -(-T // 2))))
    x, a = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    arguments = (x, a if varying else a[0, 0], x[0], reverse)
    expected = torch.ops.statefeed.triton_scan(*arguments)
    with checked(1) as checker:
        assert torch.equal(torch.ops.statefeed.triton_scan(*arguments), expected)
    assert checker.launches == 2
