"""The CPU backend against the equations (oracles, float64) and against torch.nn."""

import os
import subprocess
import sys
from collections.abc import Iterator

import oracles
import pytest
import torch
from tolerances import SAME_BY_CANCELLATION, assert_as_accurate, assert_different, assert_same, largest_error
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset

import statefeed as sf
from statefeed import native
from statefeed.backends import cpu
from statefeed.backends.protocol import Forward, Gradients, Problem, Upstream
from statefeed.cells import CELLS as TABLE
from statefeed.feedback.protocol import KernelRule
from statefeed.layout import Layout
from statefeed.native.memory import empty

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")

CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_projected"]
ORACLE = {"rnn_tanh": "tanh", "rnn_relu": "relu", "gru": "gru", "lstm": "lstm", "lstm_projected": "lstm_projected"}
NAMES = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
GATES = {"gru": 3, "lstm": 4, "lstm_projected": 4}


def widths(cell: str, H: int) -> tuple[int, ...]:
    """Widths of the parts of the state; a projected h has about a third of the units."""
    return {"lstm": (H, H), "lstm_projected": ((H + 2) // 3, H)}.get(cell, (H,))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def rule_of(diagonal: str | Tensor, corrections: int) -> KernelRule:
    """The kernel rule of a name, of a stationary diagonal (S,), or of a diagonal per row (..., S)."""
    if isinstance(diagonal, str):
        return KernelRule(diagonal, None, corrections)
    if diagonal.dim() == 1:
        return KernelRule("stationary", diagonal, corrections)
    return KernelRule("per_row", diagonal.flatten(0, -2), corrections)


class Case:
    """Random inputs of one layer; ``exact`` runs torch.nn, ``run`` the kernels, both forward and backward."""

    def __init__(self, cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, bias: bool = True) -> None:
        make = torch.Generator().manual_seed(T + 10 * B + 100 * H)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        G, self.cell, parts = GATES.get(cell, 1), cell, widths(cell, H)
        self.states, P = len(parts), parts[0]
        self.x, self.state = normal(T, B, I), tuple(normal(B, width) for width in parts)
        shapes = dict(zip(NAMES, [(G * H, I), (G * H, P), (G * H,), (G * H,), (P, H)], strict=True))
        self.names = [name for name in NAMES if (bias or "bias" not in name) and (P < H or name != "weight_hr")]
        self.weights = [normal(*shapes[name]) / H**0.5 for name in self.names]
        self.e, self.final_e = normal(T, B, P), tuple(normal(B, width) for width in parts)
        self.cast(dtype)

    def cast(self, dtype: torch.dtype) -> "Case":
        self.x, self.e = self.x.to(dtype), self.e.to(dtype)
        self.state, self.final_e = (tuple(v.to(dtype) for v in p) for p in (self.state, self.final_e))
        self.weights = [w.to(dtype) for w in self.weights]
        return self

    def named(
        self, y: Tensor, final: tuple[Tensor, ...], x: Tensor, state: tuple[Tensor, ...], w: list[Tensor]
    ) -> dict[str, Tensor]:
        values = {"y": y, "x": x, **dict(zip(self.names, w, strict=True))}
        values |= {f"final {i}": v for i, v in enumerate(final)} | {f"initial {i}": v for i, v in enumerate(state)}
        return values

    def exact(self) -> dict[str, Tensor]:
        leaves = [v.detach().clone().requires_grad_() for v in (self.x, *self.state, *self.weights)]
        x, state, weights = leaves[0], leaves[1 : 1 + self.states], leaves[1 + self.states :]
        hx = [s[None] for s in state] if self.states == 2 else state[0][None]
        run, biased = getattr(torch._VF, self.cell.removesuffix("_projected")), "bias_ih" in self.names
        y, *final = run(x, hx, weights, biased, 1, 0.0, False, False, False)
        final = [f[0] for f in final]
        d = torch.autograd.grad([y, *final], leaves, [self.e, *self.final_e])
        return self.named(
            y.detach(), tuple(f.detach() for f in final), d[0], d[1 : 1 + self.states], list(d[1 + self.states :])
        )

    def problem(self, x: Tensor | None = None, batch_sizes: Tensor | None = None, bf16: bool = False) -> Problem:
        x, B = self.x if x is None else x, len(self.state[0])
        layout = Layout(len(x), B) if batch_sizes is None else Layout(len(batch_sizes), B, batch_sizes)
        dtype = torch.bfloat16 if bf16 else None
        return Problem(TABLE[self.cell], x.flatten(0, -2), self.state, tuple(self.weights), layout, False, dtype)

    def forward(self, bf16: bool = False) -> Forward:
        return cpu.forward([self.problem(bf16=bf16)], True)[0]

    def backward(self, done: Forward, rule: KernelRule, bf16: bool = False) -> Gradients:
        upstream = Upstream(self.e.flatten(0, 1), self.final_e)
        return cpu.backward(self.problem(bf16=bf16), done, upstream, rule, True)

    def run(self, diagonal: str | Tensor, corrections: int = 0, bf16: bool = False) -> dict[str, Tensor]:
        done = self.forward(bf16)
        found = self.backward(done, rule_of(diagonal, corrections), bf16)
        return self.named(done.y.view_as(self.e), done.final, found.x.view_as(self.x), found.state, list(found.weights))

    def run_packed(
        self, lengths: list[int], diagonal: str | Tensor, corrections: int, bf16: bool = False
    ) -> dict[str, Tensor]:
        """As ``run`` for sequences of these lengths, longest first; results are in packed order."""
        rows = [pack_sequence([v[:n, b] for b, n in enumerate(lengths)]) for v in (self.x, self.e)]
        x, e = (packed.data for packed in rows)
        if isinstance(diagonal, Tensor) and diagonal.dim() == 3:
            diagonal = pack_sequence([diagonal[:n, b] for b, n in enumerate(lengths)]).data[None]
        problem = self.problem(x, rows[0].batch_sizes, bf16)
        [done] = cpu.forward([problem], True)
        found = cpu.backward(problem, done, Upstream(e, self.final_e), rule_of(diagonal, corrections), True)
        return self.named(done.y, done.final, found.x, found.state, list(found.weights))

    def alone(self, b: int, length: int) -> "Case":
        """A case with one sequence of the batch."""
        case = object.__new__(Case)
        case.cell, case.states, case.weights, case.names = self.cell, self.states, self.weights, self.names
        case.x, case.e = self.x[:length, b : b + 1], self.e[:length, b : b + 1]
        case.state, case.final_e = (tuple(v[b : b + 1] for v in p) for p in (self.state, self.final_e))
        return case


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("T", "B", "I", "H"),
    [(1, 1, 1, 2), (3, 2, 17, 3), (17, 3, 2, 127), (2, 127, 3, 17), (127, 17, 17, 2), (3, 40, 127, 64), (3, 6, 1, 200)],
)
@pytest.mark.usefixtures("threads")
def test_exact_backward_is_as_accurate_as_torch(cell: str, T: int, B: int, I: int, H: int) -> None:
    case = Case(cell, T, B, I, H, torch.float32)
    reference, found = case.exact(), case.run("exact")
    exact = case.cast(torch.float64).exact()
    assert_as_accurate(found, reference, exact)
    assert_same(case.run("exact"), exact)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("diagonal", ["direct", "jacobian", "stationary"])
@pytest.mark.usefixtures("threads")
def test_as_many_corrections_as_steps_are_exact(cell: str, diagonal: str) -> None:
    case = Case(cell, 9, 3, 5, 17, torch.float64)
    rule = torch.linspace(-0.1, 0.2, sum(widths(cell, 17))) if diagonal == "stationary" else diagonal
    assert_same(case.run(rule, 9), case.exact(), SAME_BY_CANCELLATION)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("corrections", [0, 1, 2])
@pytest.mark.parametrize("diagonal", ["dsf", "gate", "jacobian"])
def test_every_rule_follows_its_equations(cell: str, diagonal: str, corrections: int, bias: bool) -> None:
    compare_with_oracle(Case(cell, 5, 2, 2, 3, torch.float64, bias), diagonal, corrections)


@pytest.mark.parametrize("cell", ["gru", "lstm", "lstm_projected", "rnn_tanh"])
@pytest.mark.usefixtures("threads")
def test_a_sequence_of_several_chunks_follows_the_equations(cell: str) -> None:
    compare_with_oracle(Case(cell, 41, 20, 1, 2, torch.float64), "dsf", 1)
    if cell == "lstm_projected":
        compare_with_oracle(Case(cell, 41, 20, 1, 2, torch.float64), "jacobian", 1)


def expected_of(case: Case, diagonal: str | Tensor, corrections: int) -> dict[str, Tensor]:
    """The gradients of the oracle; ``diagonal`` in the form of the oracle."""
    w = dict(zip(case.names, case.weights, strict=True))
    # The oracle takes one gradient per state and step; add that of the final state to the last step.
    S = sum(s.shape[-1] for s in case.state)
    e = torch.nn.functional.pad(case.e, (0, S - case.e.shape[-1]))
    e[-1] += torch.cat(case.final_e, -1)
    return oracles.layer_gradients(ORACLE[case.cell], w, case.x, torch.cat(case.state, -1), e, (diagonal, corrections))


def comparable(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    found["initial"] = torch.cat([found[f"initial {i}"] for i in range(case.states)], -1)
    return {name: found[name] for name in expected}


def compare_with_oracle(case: Case, diagonal: str, corrections: int) -> None:
    if diagonal == "gate" and case.cell.startswith("rnn"):
        pytest.skip("an RNN has no gate")
    S = sum(s.shape[-1] for s in case.state)
    expected = expected_of(case, diagonal, corrections)
    rule = {"dsf": torch.linspace(0, 1, S, dtype=torch.float64), "gate": "direct"}.get(diagonal, diagonal)
    assert_same(comparable(case, case.run(rule, corrections), expected), expected, SAME_BY_CANCELLATION)


def rows_of_D(case: Case) -> Tensor:
    """A diagonal that differs at every step, row and unit: (T, B, S)."""
    shape = (*case.e.shape[:2], sum(s.shape[-1] for s in case.state))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.usefixtures("threads")
def test_a_diagonal_per_row_follows_its_equations(cell: str, corrections: int) -> None:
    case = Case(cell, 6, 4, 2, 3, torch.float64)
    D = rows_of_D(case)
    found, expected = case.run(D, corrections), expected_of(case, D, corrections)
    assert_same(comparable(case, found, expected), expected, SAME_BY_CANCELLATION)
    # One step too early, as an off-by-one in the kernel would have it.
    assert_different(comparable(case, case.run(D.roll(-1, 0), corrections), expected), expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.usefixtures("threads")
def test_a_diagonal_per_row_follows_its_equations_where_sequences_end(cell: str, corrections: int) -> None:
    case, lengths = Case(cell, 7, 4, 2, 3, torch.float64), [7, 4, 4, 1]
    D = rows_of_D(case)
    found = case.run_packed(lengths, D, corrections)
    each = [expected_of(case.alone(b, n), D[:n, b : b + 1], corrections) for b, n in enumerate(lengths)]
    expected = {name: sum(one[name] for one in each) for name in case.names}
    expected["x"] = pack_sequence([one["x"][:, 0] for one in each]).data
    expected["initial"] = torch.cat([one["initial"] for one in each])
    assert_same(comparable(case, found, expected), expected, SAME_BY_CANCELLATION)
    # The rows of another sequence, as an offset of the dense layout would have it.
    assert_different(comparable(case, case.run_packed(lengths, D.roll(1, 1), corrections), expected), expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("threads")
def test_a_diagonal_per_row_in_several_chunks_is_the_stationary_one(cell: str) -> None:
    case = Case(cell, 60, 17, 5, 19, torch.float32)
    D = torch.linspace(0, 0.9, sum(widths(cell, 19)))
    expected, found = case.run(D, 1), case.run(D.expand(60, 17, -1), 1)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("cell", CELLS)
def test_mean_jacobian(cell: str) -> None:
    case = Case(cell, 6, 3, 2, 5, torch.float64)
    w = dict(zip(case.names, case.weights, strict=True))
    states = oracles.run(ORACLE[cell], w, case.x, torch.cat(case.state, -1))
    expected = oracles.jacobians(ORACLE[cell], w, case.x, states).diagonal(dim1=-2, dim2=-1).mean((0, 1))
    assert_same({"mean": cpu.mean_jacobian(case.problem(), case.forward())}, {"mean": expected})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("diagonal", ["direct", "exact", "stationary"])
@pytest.mark.usefixtures("threads")
def test_packed_rows_are_their_sequences(cell: str, diagonal: str) -> None:
    lengths, H = [200, 90, 90, 3, 1], 6
    case = Case(cell, 200, 5, 4, H, torch.float64)
    rule = torch.linspace(0, 0.9, sum(widths(cell, H)), dtype=torch.float64) if diagonal == "stationary" else diagonal
    k = 1 if diagonal == "direct" else 0
    found = case.run_packed(lengths, rule, k)
    each = [case.alone(b, n).run(rule, k) for b, n in enumerate(lengths)]
    expected = {
        name: pack_sequence([one[name][:, 0] for one in each]).data
        if name in ("x", "y")
        else sum(one[name] for one in each)
        if name in NAMES
        else torch.cat([one[name] for one in each])
        for name in found
    }
    assert_same(found, expected, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0)])
def test_empty_inputs(cell: str, T: int, B: int) -> None:
    case, P = Case(cell, T, B, 2, 3, torch.float32), widths(cell, 3)[0]
    found = case.run("direct", 1)
    assert found["y"].shape == (T, B, P)
    assert all(not found[name].any() for name in case.names)
    assert found["final 0"].shape == (B, P)


@pytest.mark.parametrize("cell", CELLS)
def test_strided_inputs(cell: str) -> None:
    case = Case(cell, 5, 3, 4, 7, torch.float64)
    expected = case.run("direct", 1)
    case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    case.e = torch.stack([case.e, case.e], -1)[..., 0]
    case.weights = [torch.stack([w, w])[1] if w.dim() == 1 else w.T.contiguous().T for w in case.weights]
    assert_same(case.run("direct", 1), expected)


def test_uninitialized_memory_does_not_matter() -> None:
    case = Case("gru", 64, 32, 64, 64, torch.float32)
    expected = case.run("direct", 1)
    buffers = [empty(64 * 32, width, case.x) for width in (64, 64, 64, 64, 192, 192)]
    for buffer in buffers:
        buffer.fill_(float("nan"))
    del buffers, buffer
    assert_same(case.run("direct", 1), expected, 1e-5)


@pytest.mark.usefixtures("threads")
def test_denormals_are_not_flushed_after_a_call() -> None:
    Case("gru", 4, 64, 64, 64, torch.float32).run("direct")
    assert (torch.full((100_000,), 1e-39) * 1.0).count_nonzero() == 100_000


def test_nan_reaches_the_output() -> None:
    case = Case("lstm", 3, 2, 4, 5, torch.float32)
    case.x[1, 0, 0] = float("nan")
    y = case.forward().y.view_as(case.e)
    assert y[1:, 0].isnan().all()
    assert not y[:, 1].isnan().any()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_extreme_activations(cell: str) -> None:
    case = Case(cell, 3, 2, 4, 5, torch.float32)
    case.x *= 1e4
    reference, found = case.exact(), case.run("exact")
    assert all(v.isfinite().all() for v in found.values())
    exact = case.cast(torch.float64).exact()
    assert_as_accurate({"y": found["y"]}, {"y": reference["y"]}, {"y": exact["y"]})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", [3, 127])
@pytest.mark.usefixtures("threads")
def test_bfloat16_products_have_the_accuracy_of_bfloat16(cell: str, H: int) -> None:
    case = Case(cell, 17, 19, 5, H, torch.float32)
    found, exact = case.run("direct", 1, bf16=True), case.run("direct", 1)
    names = ["y"] if cell == "rnn_relu" else list(exact)  # a slope of 0 or 1 may flip
    worst, name = largest_error({n: found[n] for n in names}, {n: exact[n] for n in names})
    assert worst < (0.1 if cell == "rnn_relu" else 0.05), f"{name}: {worst:.1e}"


def test_operators_pass_opcheck() -> None:
    case = Case("gru", 3, 2, 4, 5, torch.float32)
    rows, h0, hidden = case.x.reshape(6, 4), case.state[0], torch.zeros(5)
    saved, y, h = (torch.zeros(6, 15), torch.zeros(6, 5)), torch.zeros(6, 5), torch.zeros(2, 5)
    arguments = (False, rows, *case.weights[:2], torch.zeros(15), torch.zeros(15), h0, None, *saved, y, h, None)
    torch.library.opcheck(torch.ops.statefeed.layer_forward.default, ("gru", *arguments))
    torch.library.opcheck(
        torch.ops.statefeed.layer_backward.default,
        ("gru", "stationary", 0, False, rows, *case.weights[:2], *saved, y, h0, None, case.e.reshape(6, 5),
         torch.zeros(2, 5), hidden, None, torch.zeros(2, 5), torch.zeros(6, 4), torch.zeros(15, 4), torch.zeros(15, 5),
         torch.zeros(15), torch.zeros(15), None),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.statefeed.sum_jacobians.default,
        ("gru", *saved, y, h0, None, torch.zeros(3, 5), None, torch.zeros(5)),
    )


class Outputs(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        case = Case("gru", 4, 64, 64, 64, torch.float32)
        return case.forward().y

    def __len__(self) -> int:
        return 2


def test_a_forked_worker_does_not_hang() -> None:
    Case("gru", 4, 64, 64, 64, torch.float32).run("direct")
    here = Outputs()[0]
    for there in DataLoader(Outputs(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=30):
        assert_same({"y": there}, {"y": here}, 1e-5)


LATE = """
import hashlib, os, sys, torch, statefeed as sf
if sys.argv[1] == "late":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the team's second thread must wait for the first
torch.set_num_threads(2)
torch.manual_seed(0)
layer, x = sf.GRU(96, 96, feedback="gate+1"), torch.randn(40, 32, 96)
for _ in range(20):  # past the point where the guard takes the machine for oversubscribed
    layer.zero_grad()
    layer(x)[0].square().sum().backward()
    print(hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in layer.parameters())).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to a core here")
def test_late_threads_give_the_same_bits() -> None:
    def run(how: str) -> list[str]:
        return subprocess.check_output([sys.executable, "-c", LATE, how], text=True, timeout=60).split()

    found = run("late") + run("free")
    assert len(found) == 40
    assert len(set(found)) == 1


# Determinism ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", ["bptt", "dsf", "jacobian+1"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "LSTM with a projection"])
@pytest.mark.usefixtures("threads")
def test_the_same_call_gives_the_same_bits(name: str, rule: str, bf16: bool) -> None:
    """Also where torch is asked for deterministic algorithms, which fills new memory with NaN."""
    torch.manual_seed(0)
    kind, _, projected = name.partition(" ")
    options = {"proj_size": 24} if projected else {}
    layer, x = getattr(sf, kind)(32, 64, feedback=rule, **options), torch.randn(60, 16, 32)
    e = torch.randn(60, 16, options.get("proj_size", 64))

    def results() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y, _ = layer(leaf)
        y.backward(e.to(y.dtype))
        assert leaf.grad is not None
        return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    expected = results()
    assert len(expected) == (7 if projected else 6)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            torch.testing.assert_close(results(), expected, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


# Sums over many rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "gate", "share"), [("RNN", 0, 1.0), ("GRU", 2, 0.25), ("LSTM", 2, 0.25)])
@pytest.mark.parametrize(("T", "B"), [(1024, 256), (50000, 1), (37, 3)])
@pytest.mark.usefixtures("threads")
def test_bias_gradients_are_summed_as_exactly_as_torch_sums(name: str, gate: int, share: float, T: int, B: int) -> None:
    """At zero weights the gradient of a gate's bias is a power of two times the sum of all incoming gradients."""
    H = 5
    layer = getattr(sf, name)(2, H, feedback="ft-bptt")
    for weight in layer.parameters():
        torch.nn.init.zeros_(weight)
    torch.manual_seed(0)
    e = torch.randn(T, B, H)
    layer(torch.zeros(T, B, 2))[0].backward(e)
    exact = share * e.double().sum((0, 1))
    found = layer.bias_hh_l0.grad.view(-1, H)[gate]
    theirs = share * e.sum((0, 1))
    scale = exact.norm()
    assert (found.double() - exact).norm() / scale <= max(2e-7, 2 * float((theirs.double() - exact).norm() / scale))
