"""The GPU kernels against the equations (oracles, float64) and the PyTorch path.

On a CPU the kernels run in Triton's interpreter, on a GPU compiled; the launches are the same.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import oracles
import pytest
import test_kernels_layer
import torch
from functorch.compile import make_boxed_func
from test_kernels_layer import GATES, ORACLE, compare_with_oracle, widths
from tolerances import MULTIPLE, SAME_BY_CANCELLATION, assert_as_accurate, assert_different, assert_same, error
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils.rnn import pack_sequence

import statefeed as sf
from statefeed import stack
from statefeed.backends import BACKENDS, Problem, Upstream, reference
from statefeed.cells import CELLS as TABLE
from statefeed.feedback import KernelRule
from statefeed.layout import Layout

triton = pytest.importorskip("triton", reason="Triton is not installed")

from statefeed.backends.triton import reverse  # noqa: E402
from statefeed.backends.triton.cells import CELLS as KERNELS  # noqa: E402
from statefeed.scan import chunks  # noqa: E402
from statefeed.scan.triton import scan  # noqa: E402

BACKEND = BACKENDS["triton"]
CELLS = [cell for cell in test_kernels_layer.CELLS if cell in KERNELS]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Only the interpreter supports a replaced function of a kernel, and CPU tensors.
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="only in Triton's interpreter")
# On a GPU float32 is compared with float32, and cuDNN warns of the weights of a case, which are tensors of their own.
pytestmark = [
    pytest.mark.usefixtures("ieee_float32"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

# The interpreter computes with NumPy, which warns of overflows; a GPU does not.
OVERFLOWS = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of two steps for every sequence."""
    monkeypatch.setattr(chunks, "steps", lambda *_: 2)


@pytest.fixture(params=["whole", "chunked"])
def chunking(request: pytest.FixtureRequest) -> None:
    if request.param == "chunked":
        request.getfixturevalue("chunked")


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


class Case(test_kernels_layer.Case):
    """``run`` is torch's forward pass and the kernels' backward pass; ``reference`` is the PyTorch path."""

    def run(
        self,
        diagonal: str | Tensor,
        corrections: int = 0,
        batch_sizes: Tensor | None = None,
        reverse: bool = False,
    ) -> dict[str, Tensor]:
        problem, e, final_e = self.problem(batch_sizes, reverse)
        D = diagonal.to(DEVICE) if isinstance(diagonal, Tensor) else None
        name = "direct" if diagonal == "gate" else diagonal
        rule = KernelRule(str(name) if D is None else ("stationary", "per_row")[D.dim() - 1], D, corrections)
        done = BACKEND.recompute(problem, BACKEND.forward([problem], True)[0])
        found = BACKEND.backward(problem, done, Upstream(e.reshape(-1, e.shape[-1]), final_e), rule, True)
        y, d_x = done.y.view(e.shape), found.x.view(self.x.shape)
        named = self.named(y, done.final, d_x, found.state, list(found.weights))
        return {name: value.cpu() for name, value in named.items()}

    def problem(
        self, batch_sizes: Tensor | None = None, reverse: bool = False
    ) -> tuple[Problem, Tensor, tuple[Tensor, ...]]:
        x, e, *rest = (v.to(DEVICE) for v in (self.x, self.e, *self.state, *self.final_e, *self.weights))
        state, final_e, w = rest[: self.states], rest[self.states : 2 * self.states], rest[2 * self.states :]
        layout = Layout(len(x) if batch_sizes is None else len(batch_sizes), len(state[0]), batch_sizes)
        rows = x.reshape(-1, x.shape[-1])
        return Problem(TABLE[self.cell], rows, tuple(state), tuple(w), layout, reverse), e, tuple(final_e)

    def reference(self, rule: str, corrections: int) -> dict[str, Tensor]:
        T, B = self.x.shape[:2]
        weights = tuple(self.weights)
        problem = Problem(TABLE[self.cell], self.x.flatten(0, 1), self.state, weights, Layout(T, B))
        done = reference.recompute(problem, reference.forward([problem], True)[0])
        size = sum(problem.sizes)
        D = sf.Feedback(rule).stationary(size, done.y.dtype, done.y.device)
        kernel = KernelRule({"gate": "direct"}.get(rule, rule) if D is None else "stationary", D, corrections)
        upstream = Upstream(self.e.flatten(0, 1), self.final_e)
        found = reference.backward(problem, done, upstream, kernel, True)
        y, d_x = done.y.view(T, B, -1), found.x.view(self.x.shape)
        return self.named(y, done.final, d_x, found.state, list(found.weights))


def rules_of(cell: str) -> list[str]:
    return ["dsf", "gate", "jacobian"] if cell in GATES else ["dsf", "jacobian"]


def ramp(case: Case) -> Tensor:
    return torch.linspace(0, 1, sum(s.shape[-1] for s in case.state), dtype=torch.float64)


# The backward pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("corrections", "bias", "chunking"),
    [(0, True, "chunked"), (1, False, "chunked"), (2, True, "whole")],
    indirect=["chunking"],
)
@pytest.mark.usefixtures("chunking")
def test_every_rule_follows_its_equations(cell: str, corrections: int, bias: bool) -> None:
    for rule in rules_of(cell):
        compare_with_oracle(Case(cell, 5, 2, 2, 3, torch.float64, bias), rule, corrections)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("chunking", "nan_in_new_memory")
def test_a_diagonal_per_row_follows_its_equations(cell: str, corrections: int, reverse: bool) -> None:
    case = Case(cell, 5, 2, 2, 3, torch.float64)
    S = sum(widths(cell, 3))
    D = torch.rand(5, 2, S, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w, order = (
        dict(zip(case.names, case.weights, strict=True)),
        (lambda rows: rows.flip(0)) if reverse else (lambda r: r),
    )
    e = torch.nn.functional.pad(order(case.e), (0, S - case.e.shape[-1]))
    e[-1] += torch.cat(case.final_e, -1)
    initial = torch.cat(case.state, -1)
    expected = oracles.layer_gradients(ORACLE[cell], w, order(case.x), initial, e, (order(D), corrections))
    expected["x"] = order(expected["x"])
    found = case.run(D.flatten(0, 1), corrections, reverse=reverse)
    assert_same(case.run(D.flatten(0, 1).T.contiguous().T, corrections, reverse=reverse), found)
    found["initial"] = torch.cat([found[f"initial {i}"] for i in range(case.states)], -1)
    assert_same({name: found[name] for name in expected}, expected, SAME_BY_CANCELLATION)
    shifted = oracles.layer_gradients(ORACLE[cell], w, order(case.x), initial, e, (order(D).roll(1, 0), corrections))
    assert_different({"x": found["x"]}, {"x": order(shifted["x"])})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("chunking", "nan_in_new_memory")
def test_the_reverse_direction_is_the_forward_one_on_reversed_rows(cell: str, packed: bool) -> None:
    case = Case(cell, 6, 3, 2, 3, torch.float64)
    batch_sizes = torch.tensor([3, 3, 2, 1, 1, 1]) if packed else None
    if packed:
        case.x, case.e = case.x.flatten(0, 1)[:11], case.e.flatten(0, 1)[:11]
    layout = Layout(6, 3, batch_sizes)
    rule = "gate" if cell in GATES else "jacobian"
    found = case.run(rule, 1, batch_sizes, reverse=True)
    for name in ("x", "e"):
        rows = getattr(case, name)
        setattr(case, name, layout.reverse(rows.reshape(-1, rows.shape[-1])).view(rows.shape))
    expected = case.run(rule, 1, batch_sizes)
    for name in ("x", "y"):
        rows = expected[name]
        expected[name] = layout.reverse(rows.reshape(-1, rows.shape[-1])).view(rows.shape)
    assert_same(found, expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("chunked")
@OVERFLOWS
def test_a_zero_carry_stays_zero_in_a_chunk_whose_product_overflows(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(cell, 7, 2, 2, 3, torch.float32)
    # Two steps of a chunk multiply to infinity; no step before the last one that is processed has a gradient.
    case.e[1:], case.final_e = 0, tuple(torch.zeros_like(v) for v in case.final_e)
    D = torch.full((sum(widths(cell, 3)),), 1e20)
    found = case.run(D)
    monkeypatch.setattr(chunks, "steps", lambda T, *_: T)
    expected = case.run(D)
    assert all(v.isfinite().all() for v in expected.values())
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("chunked", "nan_in_new_memory")
def test_as_many_corrections_as_steps_are_exact(cell: str) -> None:
    for rule in rules_of(cell):
        case = Case(cell, 4, 3, 2, 17, torch.float64)
        D = torch.linspace(-0.1, 0.2, sum(widths(cell, 17)), dtype=torch.float64) if rule == "dsf" else rule
        assert_same(case.run(D, 4), case.exact(), SAME_BY_CANCELLATION)


@pytest.mark.parametrize(
    ("cell", "T", "B", "I", "H"),
    [(cell, *sizes) for cell in CELLS for sizes in [(1, 1, 1, 2), (3, 2, 17, 3), (17, 3, 2, 127), (2, 127, 3, 17)]]
    + [("gru", 127, 3, 17, 2)],
)
def test_float32_is_as_accurate_as_the_pytorch_path(cell: str, T: int, B: int, I: int, H: int) -> None:
    rules = rules_of(cell)
    rule, corrections = rules[T % len(rules)], B % 2
    if rule == "dsf":
        corrections = 0
    case = Case(cell, T, B, I, H, torch.float32)
    found = case.run(ramp(case) if rule == "dsf" else rule, corrections)
    reference = case.reference(rule, corrections)
    # cuDNN approximates tanh and the sigmoid; on an H200 its y has errors of up to 120 roundoffs.
    multiple = 4 * MULTIPLE if DEVICE.type == "cuda" else MULTIPLE
    assert_as_accurate(found, reference, case.cast(torch.float64).reference(rule, corrections), multiple)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("chunked")
def test_half_precision_is_as_accurate_as_the_pytorch_path(cell: str, dtype: torch.dtype) -> None:
    rule = "gate" if cell in GATES else "jacobian"
    case = Case(cell, 7, 3, 5, 17, dtype)
    found, reference = case.run(rule, 1), case.reference(rule, 1)
    assert {v.dtype for v in found.values()} == {dtype}
    assert_as_accurate(found, reference, case.cast(torch.float64).reference(rule, 1))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("chunked")
def test_packed_rows_are_their_sequences(cell: str) -> None:
    lengths = [6, 3, 3, 1]
    case = Case(cell, 6, 4, 4, 3, torch.float64)
    x, e, state, final_e = case.x, case.e, case.state, case.final_e
    rule: str | Tensor = "gate" if cell in GATES else ramp(case)
    k = 1 if cell in GATES else 0
    alone = []
    for b, n in enumerate(lengths):
        case.x, case.e = x[:n, b : b + 1], e[:n, b : b + 1]
        case.state, case.final_e = (tuple(s[b : b + 1] for s in part) for part in (state, final_e))
        alone.append(case.run(rule, k))
    expected = {name: sum(a[name] for a in alone) for name in case.names}
    expected |= {name: pack_sequence([a[name][:, 0] for a in alone]).data for name in ("x", "y")}
    ends = [f"{which} {i}" for which in ("final", "initial") for i in range(case.states)]
    expected |= {name: torch.cat([a[name] for a in alone]) for name in ends}
    packed, case.e = (pack_sequence([v[:n, b] for b, n in enumerate(lengths)]) for v in (x, e))
    case.x, case.e, case.state, case.final_e = packed.data, case.e.data, state, final_e
    assert_same(case.run(rule, k, packed.batch_sizes), expected, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("cell", ["gru", "lstm", "lstm_projected"])
def test_strided_inputs(cell: str) -> None:
    case = Case(cell, 3, 3, 4, 7, torch.float64)
    expected = case.run("gate", 1)
    case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    case.e = torch.stack([case.e, case.e], -1)[..., 0]
    case.state = tuple(s.T.contiguous().T for s in case.state)
    case.weights = [torch.stack([w, w])[1] if w.dim() == 1 else w.T.contiguous().T for w in case.weights]
    assert_same(case.run("gate", 1), expected)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("no rule", "must be one of stationary, per_row, direct, jacobian, got 'no rule'"),
        (torch.zeros(5), r"must have the shape \(6,\), got \(5,\)"),
        (torch.zeros(4, 6), r"must have the shape \(8, 6\), got \(4, 6\)"),
        ("stationary", r"must have the shape \(6,\), got None"),
    ],
)
def test_a_rule_that_the_kernels_cannot_read_raises(rule: str | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case("lstm", 4, 2, 2, 3, torch.float32).run(rule)


def test_an_empty_batch() -> None:
    case = Case("lstm", 4, 0, 2, 3, torch.float32)
    found = case.run("gate", 1)
    assert found["x"].shape == (4, 0, 2)
    assert found["initial 1"].shape == (0, 3)
    assert all(not found[name].any() for name in case.names)


def test_nan_reaches_the_gradients_of_its_sequence_only() -> None:
    case = Case("gru", 3, 2, 4, 5, torch.float32)
    case.e[1, 0, 0] = float("nan")
    found = case.run("gate")["x"]
    assert found[:2, 0].isnan().all()
    assert not found[:, 1].isnan().any()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("chunking", "nan_in_new_memory")
def test_mean_jacobian(cell: str) -> None:
    case = Case(cell, 5, 3, 2, 5, torch.float64)
    w = dict(zip(case.names, case.weights, strict=True))
    states = oracles.run(ORACLE[cell], w, case.x, torch.cat(case.state, -1))
    expected = oracles.jacobians(ORACLE[cell], w, case.x, states).diagonal(dim1=-2, dim2=-1).mean((0, 1))
    problem, *_ = case.problem()
    found = BACKEND.mean_jacobian(problem, BACKEND.recompute(problem, BACKEND.forward([problem], True)[0]))
    assert_same({"mean": found.cpu()}, {"mean": expected})


@interpreted
@pytest.mark.parametrize("wrong", ["the carries between chunks lost", "a local gradient halved", "a step late"])
@pytest.mark.usefixtures("chunked")
def test_planted_errors_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong.startswith("the carries"):
        monkeypatch.setattr(reverse, "summarize", {(1, 3): lambda *arguments, **_: arguments[10].zero_()})
    elif wrong.startswith("a local"):
        right = KERNELS["gru"].local
        halved = KERNELS["gru"]._replace(local=lambda *a: (right(*a)[0] * 0.5, *right(*a)[1:]))
        monkeypatch.setitem(KERNELS, "gru", halved)
    else:
        right = reverse.row_at
        monkeypatch.setattr(
            reverse, "row_at", lambda t, b, B, *a: (right(t, b, B, *a)[0] % (4 * B), right(t, b, B, *a)[1])
        )
    with pytest.raises(AssertionError, match="is allowed"):
        compare_with_oracle(Case("gru", 5, 2, 2, 3, torch.float64), "gate", 0)


# The scan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.usefixtures("nan_in_new_memory")
def test_scan_solves_the_recurrence(reverse: bool, varying: bool) -> None:
    make = torch.Generator().manual_seed(0)
    for T in (1, 3, 17, 127):
        x, a, initial = (torch.randn(T + 1, 2, 3, generator=make, dtype=torch.float64) for _ in range(3))
        x, a, initial = x[1:].mT.contiguous().mT, a[1:].clamp(-1, 1) if varying else a[0, 0], initial[0]
        a[..., 0] = 0
        start = initial if T != 3 else None
        found = scan(x.to(DEVICE), a.to(DEVICE), None if start is None else start.to(DEVICE), reverse)
        assert_same({"y": found.cpu()}, {"y": oracles.scan(x, a, reverse, start)})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("chunked")
@OVERFLOWS
def test_a_scan_whose_products_overflow_is_finite_where_the_states_are(
    reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, a = torch.zeros(9, 2, 3, device=DEVICE), torch.full((9, 2, 3), 1e20, device=DEVICE)
    x[0 if reverse else -1] = 1.0
    assert_same({"y": scan(x, a, None, reverse).cpu()}, {"y": x.cpu()})
    # A product that overflowed and then meets a factor of zero is zero: steps three to five are one chunk.
    monkeypatch.setattr(chunks, "steps", lambda *_: 3)
    order = (lambda rows: rows.flip(0)) if reverse else (lambda rows: rows)
    x[:], a[:] = 0, 1
    order_of_a = torch.tensor([1, 1, 1, 1e20, 1e20, 0, 1, 1, 1], device=DEVICE)
    a[:], x[8 if reverse else 0] = order(order_of_a)[:, None, None], 1e-30
    expected = oracles.scan(x.double().cpu(), a.double().cpu(), reverse)
    assert_same({"y": scan(x, a, None, reverse).cpu()}, {"y": expected.float()}, 1e-6)


@pytest.mark.usefixtures("chunked")
def test_the_comparison_of_scans_rejects_wrong_recurrences() -> None:
    x, a = torch.ones(7, 2, 3, device=DEVICE, dtype=torch.float64), torch.full((3,), 0.9, device=DEVICE)
    found = {"y": scan(x, a.double(), None, False).cpu()}
    assert_different(found, {"y": oracles.scan(x.cpu(), a.double().cpu(), True)})
    assert_different(found, {"y": oracles.scan(x.cpu(), -a.double().cpu(), False)})


@pytest.mark.usefixtures("chunking")
def test_an_lstms_cell_states_are_recovered() -> None:
    case = Case("lstm", 5, 3, 2, 4, torch.float64)
    w = dict(zip(case.names, case.weights, strict=True))
    states = oracles.run("lstm", w, case.x, torch.cat(case.state, -1))
    problem, *_ = case.problem()
    found = BACKEND.recompute(problem, BACKEND.forward([problem], True)[0]).saved[2]
    assert_same({"c": found.cpu().view(5, 3, 4)}, {"c": states[:-1, :, 4:]})


def test_a_scan_in_float32_is_as_accurate_as_the_prefix_sum() -> None:
    make = torch.Generator().manual_seed(0)
    x, a = torch.randn(127, 1, 7, generator=make), torch.linspace(0.5, 1, 7)
    exact = oracles.scan(x.double(), a.double())
    found, prefix = scan(x.to(DEVICE), a.to(DEVICE), None, False).cpu(), sf.diagonal_scan(x, a, method="prefix")
    assert error(found, exact) < 8 * error(prefix, exact)


# Chunks ---------------------------------------------------------------------------------------------------------------


def test_there_are_chunks_where_they_leave_fewer_dependent_steps() -> None:
    cpu = torch.device("cpu")
    assert chunks.steps(127, 8, cpu) == 127, "the processor is full"
    assert chunks.steps(1, 1, cpu) == chunks.steps(1, 0, cpu) == 1
    for T in (2, 16, 127, 1000, 65_536):
        length = chunks.steps(T, 1, cpu)
        count = -(-T // length)
        assert count == 1 or 2 * length + count < T
        assert 1 <= count <= 8
    assert chunks.steps(65_536, 1, cpu) == 65_536 // 8


# From the layers ------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize(("rule", "packed"), [("dsf", False), ("calibrated", True), ("jacobian+1", False)])
def test_layers_through_the_kernels_are_layers_through_pytorch(
    cell: str, rule: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = getattr(sf, cell)(3, 4, 2, bidirectional=True, dtype=torch.float64, feedback=rule)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for name in ("reference", "triton"):
        monkeypatch.setattr(stack, "choose", lambda *_, name=name: BACKENDS[name])
        batch = pack_sequence([x[:, 0], x[:3, 1]]) if packed else x
        if rule == "calibrated":
            model.diagonal.zero_(), model.diagonal_updates.zero_()
        y = model(batch)[0]
        loss = (y.data if packed else y).square().sum()
        found.append(dict(zip("abcdefghijklmnopq", torch.autograd.grad(loss, [x, *model.parameters()]), strict=False)))
    assert_same(found[1], found[0], SAME_BY_CANCELLATION)


@interpreted
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # a warning of torch while it traces
@pytest.mark.compiles
def test_a_compiled_layer_is_one_graph_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "choose", lambda *_: BACKENDS["triton"])
    torch.manual_seed(0)
    model, x = sf.LSTM(3, 4, dtype=torch.float64, feedback="gate+1"), torch.randn(4, 2, 3, dtype=torch.float64)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found, expected = (torch.autograd.grad(m(x)[0].sum(), list(model.parameters())) for m in (compiled, model))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # a warning of torch while it traces
@pytest.mark.compiles
def test_the_graphs_of_a_layer_do_not_depend_on_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "choose", lambda *_: BACKENDS["triton"])
    model, graphs = sf.GRU(3, 4, 2, bidirectional=True, feedback="dsf"), []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    for T in (2, 3, 9):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=True):
            compiled = torch.compile(model, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
            compiled(torch.randn(T, 2, 3))[0].sum().backward()
    forward, backward = graphs[::2], graphs[1::2]
    assert len(forward) == len(backward) == 3
    assert len({len(graph) for graph in forward}) == len({len(graph) for graph in backward}) == 1
    assert sum("cudnn_layer" in name for name in forward[0]) == 2, "one call for both directions of a layer"


@pytest.mark.parametrize("cell", CELLS)
def test_operators_pass_opcheck(cell: str) -> None:
    case = Case(cell, 3, 2, 4, 4, torch.float32)
    shapes = (case.x.flatten(0, 1), case.e.flatten(0, 1), *case.state, *case.weights)
    x, e, *rest = (v.to(DEVICE) for v in shapes)
    state, weights = rest[: case.states], rest[case.states :]
    y = torch.tanh(e)
    operators = torch.ops.statefeed
    inputs = (cell, x, y, state, weights, None, False, "ieee")
    torch.library.opcheck(operators.triton_recompute.default, inputs)
    saved = operators.triton_recompute(*inputs)
    torch.library.opcheck(operators.triton_mean_jacobian.default, (cell, *saved, y, weights[1], 2, None))
    D = torch.zeros(sum(widths(cell, 4)), device=DEVICE)
    torch.library.opcheck(
        operators.triton_backward.default,
        (cell, "stationary", *saved, x, y, state, weights, [e, *state], D, None, 1, False, True, "ieee"),
    )
    torch.library.opcheck(operators.triton_scan.default, (x, x[0], None, False))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1000, 65_536])
def test_a_long_scan_on_a_gpu(T: int) -> None:
    x, a = torch.randn(T, 1, 70), torch.linspace(0, 1, 70)
    exact = sf.diagonal_scan(x.double(), a.double())
    prefix = sf.diagonal_scan(x, a, method="prefix")
    assert error(sf.diagonal_scan(x.to(DEVICE), a.to(DEVICE)).cpu(), exact) < 8 * error(prefix, exact)


# Without Triton -------------------------------------------------------------------------------------------------------

WITHOUT = """
import sys, warnings
sys.modules["triton"] = None
from statefeed import native as kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(kernels.available("cuda"), kernels.available("cuda"), len(caught), *(w.message for w in caught))
"""


def program(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_without_triton_there_is_one_warning() -> None:
    printed = program(WITHOUT).stdout
    assert printed.startswith(
        "False False 1 statefeed uses plain torch operations instead of its kernels: the CUDA kernels cannot be used"
    )
    assert program(WITHOUT, STATEFEED_KERNELS="off").stdout.split() == ["False", "False", "0"]
    assert "STATEFEED_KERNELS is on, but the CUDA kernels" in program(WITHOUT, STATEFEED_KERNELS="on").stderr


# Ahead of time --------------------------------------------------------------------------------------------------------


def test_every_launch_compiles_for_a100_and_h100() -> None:
    """The compiler rejects code that the interpreter accepts; compiling needs no GPU."""
    script = Path(__file__).parent / "compile_triton.py"
    done = program(script.read_text(), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    kernels = set(done.stdout.split())
    assert {
        f"{name}:sm_{arch}"
        for name in ("run", "summarize", "add_jacobians", "_run", "_summarize", "_gather")
        for arch in (80, 90)
    } <= kernels
