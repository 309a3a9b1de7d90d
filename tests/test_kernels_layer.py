"""The fused kernels against the equations (oracles, float64) and against torch.nn."""

import os
import subprocess
import sys
from collections.abc import Iterator

import oracles
import pytest
import torch
from tolerances import SAME_BY_CANCELLATION, assert_as_accurate, assert_same, largest_error
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset

from statefeed import native as kernels
from statefeed.backends.cpu import layer
from statefeed.native.memory import empty

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the kernels cannot be built here")

CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]
ORACLE = {"rnn_tanh": "tanh", "rnn_relu": "relu", "gru": "gru", "lstm": "lstm"}
NAMES = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
GATES = {"gru": 3, "lstm": 4}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Case:
    """Random inputs of one layer; ``exact`` is torch.nn's forward and backward, ``run`` the kernels'."""

    def __init__(self, cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, bias: bool = True) -> None:
        make = torch.Generator().manual_seed(T + 10 * B + 100 * H)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        G, self.cell, self.states = GATES.get(cell, 1), cell, 2 if cell == "lstm" else 1
        self.x, self.state = normal(T, B, I), tuple(normal(B, H) for _ in range(self.states))
        shapes = [(G * H, I), (G * H, H), (G * H,), (G * H,)][: 4 if bias else 2]
        self.weights = [normal(*shape) / H**0.5 for shape in shapes]
        self.e, self.final_e = normal(T, B, H), tuple(normal(B, H) for _ in range(self.states))
        self.cast(dtype)

    def cast(self, dtype: torch.dtype) -> "Case":
        self.x, self.e = self.x.to(dtype), self.e.to(dtype)
        self.state, self.final_e = (tuple(v.to(dtype) for v in p) for p in (self.state, self.final_e))
        self.weights = [w.to(dtype) for w in self.weights]
        return self

    def named(
        self, y: Tensor, final: tuple[Tensor, ...], x: Tensor, state: tuple[Tensor, ...], w: list[Tensor]
    ) -> dict[str, Tensor]:
        values = {"y": y, "x": x, **dict(zip(NAMES, w, strict=False))}
        values |= {f"final {i}": v for i, v in enumerate(final)} | {f"initial {i}": v for i, v in enumerate(state)}
        return values

    def exact(self) -> dict[str, Tensor]:
        leaves = [v.detach().clone().requires_grad_() for v in (self.x, *self.state, *self.weights)]
        x, state, weights = leaves[0], leaves[1 : 1 + self.states], leaves[1 + self.states :]
        hx = [s[None] for s in state] if self.states == 2 else state[0][None]
        y, *final = getattr(torch._VF, self.cell)(x, hx, weights, len(weights) > 2, 1, 0.0, False, False, False)
        final = [f[0] for f in final]
        d = torch.autograd.grad([y, *final], leaves, [self.e, *self.final_e])
        return self.named(
            y.detach(), tuple(f.detach() for f in final), d[0], d[1 : 1 + self.states], list(d[1 + self.states :])
        )

    def run(self, diagonal: str | Tensor, corrections: int = 0, rounded: bool = False) -> dict[str, Tensor]:
        y, final, tape = layer.forward(self.cell, self.x, self.state, self.weights, rounded=rounded)
        found = layer.backward(
            self.cell, tape, self.x, y, self.state, self.weights, (self.e, *self.final_e), diagonal, corrections,
            rounded=rounded,
        )  # fmt: skip
        return self.named(y, final, found.x, found.state, found.weights)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("T", "B", "I", "H"),
    [(1, 1, 1, 1), (3, 2, 17, 3), (17, 3, 2, 127), (2, 127, 3, 17), (127, 17, 17, 2), (3, 40, 127, 64)],
)
@pytest.mark.usefixtures("threads")
def test_exact_backward_is_as_accurate_as_torch(cell: str, T: int, B: int, I: int, H: int) -> None:
    case = Case(cell, T, B, I, H, torch.float32)
    reference, found = case.exact(), case.run("bptt")
    exact = case.cast(torch.float64).exact()
    assert_as_accurate(found, reference, exact)
    assert_same(case.run("bptt"), exact)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("diagonal", ["gate", "jacobian", "stationary"])
@pytest.mark.usefixtures("threads")
def test_as_many_corrections_as_steps_are_exact(cell: str, diagonal: str) -> None:
    case = Case(cell, 9, 3, 5, 17, torch.float64)
    rule = torch.linspace(-0.1, 0.2, 17 * case.states) if diagonal == "stationary" else diagonal
    assert_same(case.run(rule, 9), case.exact(), SAME_BY_CANCELLATION)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("corrections", [0, 1, 2])
@pytest.mark.parametrize("diagonal", ["dsf", "gate", "jacobian"])
def test_every_rule_follows_its_equations(cell: str, diagonal: str, corrections: int, bias: bool) -> None:
    compare_with_oracle(Case(cell, 5, 2, 2, 3, torch.float64, bias), diagonal, corrections)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
@pytest.mark.usefixtures("threads")
def test_a_sequence_of_several_chunks_follows_the_equations(cell: str) -> None:
    compare_with_oracle(Case(cell, 41, 20, 1, 2, torch.float64), "dsf", 1)


def compare_with_oracle(case: Case, diagonal: str, corrections: int) -> None:
    if diagonal == "gate" and case.cell.startswith("rnn"):
        pytest.skip("an RNN has no gate")
    w = dict(zip(NAMES, case.weights, strict=False))
    H = case.weights[1].shape[1]
    # The oracle takes one gradient per state and step; the final state's is that of the last.
    e = torch.cat([case.e, torch.zeros_like(case.e)], -1)[..., : case.states * H].clone()
    e[-1] += torch.cat(case.final_e, -1)
    expected = oracles.layer_gradients(
        ORACLE[case.cell], w, case.x, torch.cat(case.state, -1), e, (diagonal, corrections)
    )
    rule = torch.linspace(0, 1, case.states * H, dtype=torch.float64) if diagonal == "dsf" else diagonal
    found = case.run(rule, corrections)
    found["initial"] = torch.cat([found[f"initial {i}"] for i in range(case.states)], -1)
    assert_same({name: found[name] for name in expected}, expected, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("cell", CELLS)
def test_mean_jacobian(cell: str) -> None:
    case = Case(cell, 6, 3, 2, 5, torch.float64)
    w = dict(zip(NAMES, case.weights, strict=False))
    states = oracles.run(ORACLE[cell], w, case.x, torch.cat(case.state, -1))
    expected = oracles.jacobians(ORACLE[cell], w, case.x, states).diagonal(dim1=-2, dim2=-1).mean((0, 1))
    y, _, tape = layer.forward(cell, case.x, case.state, case.weights)
    found = layer.mean_jacobian(cell, tape, y, case.state, case.weights[1])
    assert_same({"mean": found}, {"mean": expected})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("diagonal", ["gate", "bptt", "stationary"])
@pytest.mark.usefixtures("threads")
def test_packed_rows_are_their_sequences(cell: str, diagonal: str) -> None:
    lengths, H = [200, 90, 90, 3, 1], 6
    case = Case(cell, 200, 5, 4, H, torch.float64)
    rule = torch.linspace(0, 0.9, H * case.states, dtype=torch.float64) if diagonal == "stationary" else diagonal
    packed, e = (pack_sequence([v[:n, b] for b, n in enumerate(lengths)]) for v in (case.x, case.e))
    y, final, tape = layer.forward(cell, packed.data, case.state, case.weights, packed.batch_sizes)
    grads, k = (e.data, *case.final_e), 1 if diagonal == "gate" else 0
    found = layer.backward(
        cell, tape, packed.data, y, case.state, case.weights, grads, rule, k, packed.batch_sizes
    )  # fmt: skip
    x, outputs, initial, ends, total = [], [], [], [], [torch.zeros_like(w) for w in case.weights]
    for b, n in enumerate(lengths):
        state = tuple(s[b : b + 1] for s in case.state)
        alone = case.x[:n, b : b + 1]
        y_b, final_b, tape_b = layer.forward(cell, alone, state, case.weights)
        e_b = (case.e[:n, b : b + 1], *(g[b : b + 1] for g in case.final_e))
        d = layer.backward(cell, tape_b, alone, y_b, state, case.weights, e_b, rule, k)
        x.append(d.x[:, 0]), outputs.append(y_b[:, 0]), initial.append(d.state), ends.append(final_b)
        total = [a + v for a, v in zip(total, d.weights, strict=True)]
    expected = case.named(
        pack_sequence(outputs).data, tuple(map(torch.cat, zip(*ends, strict=True))), pack_sequence(x).data,
        tuple(map(torch.cat, zip(*initial, strict=True))), total,
    )  # fmt: skip
    assert_same(case.named(y, final, found.x, found.state, found.weights), expected, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0)])
def test_nothing_in_nothing_out(cell: str, T: int, B: int) -> None:
    found = Case(cell, T, B, 2, 3, torch.float32).run("gate", 1)
    assert found["y"].shape == (T, B, 3)
    assert all(not found[name].any() for name in NAMES)
    assert found["final 0"].shape == (B, 3)


@pytest.mark.parametrize("cell", CELLS)
def test_strided_inputs(cell: str) -> None:
    case = Case(cell, 5, 3, 4, 7, torch.float64)
    expected = case.run("gate", 1)
    case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    case.e = torch.stack([case.e, case.e], -1)[..., 0]
    case.weights = [torch.stack([w, w])[1] if w.dim() == 1 else w.T.contiguous().T for w in case.weights]
    assert_same(case.run("gate", 1), expected)


def test_what_lies_in_memory_does_not_matter() -> None:
    case = Case("gru", 64, 32, 64, 64, torch.float32)
    expected = case.run("gate", 1)
    buffers = [empty(64 * 32, width, case.x) for width in (64, 64, 64, 64, 192, 192)]
    for buffer in buffers:
        buffer.fill_(float("nan"))
    del buffers, buffer
    assert_same(case.run("gate", 1), expected, 1e-5)


@pytest.mark.usefixtures("threads")
def test_denormals_count_outside() -> None:
    Case("gru", 4, 64, 64, 64, torch.float32).run("gate")
    assert (torch.full((100_000,), 1e-39) * 1.0).count_nonzero() == 100_000


def test_nan_reaches_the_output() -> None:
    case = Case("lstm", 3, 2, 4, 5, torch.float32)
    case.x[1, 0, 0] = float("nan")
    y, _, _ = layer.forward("lstm", case.x, case.state, case.weights)
    assert y[1:, 0].isnan().all()
    assert not y[:, 1].isnan().any()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_extreme_activations(cell: str) -> None:
    case = Case(cell, 3, 2, 4, 5, torch.float32)
    case.x *= 1e4
    reference, found = case.exact(), case.run("bptt")
    assert all(v.isfinite().all() for v in found.values())
    exact = case.cast(torch.float64).exact()
    assert_as_accurate({"y": found["y"]}, {"y": reference["y"]}, {"y": exact["y"]})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", [3, 127])
@pytest.mark.usefixtures("threads")
def test_bfloat16_products_lose_no_more_than_bfloat16_does(cell: str, H: int) -> None:
    case = Case(cell, 17, 19, 5, H, torch.float32)
    found, exact = case.run("gate", 1, rounded=True), case.run("gate", 1)
    names = ["y"] if cell == "rnn_relu" else list(exact)  # a slope of 0 or 1 may flip
    worst, name = largest_error({n: found[n] for n in names}, {n: exact[n] for n in names})
    assert worst < (0.1 if cell == "rnn_relu" else 0.05), f"{name}: {worst:.1e}"


def test_operators_pass_opcheck() -> None:
    case = Case("gru", 3, 2, 4, 5, torch.float32)
    rows, h0, hidden = case.x.reshape(6, 4), case.state[0], torch.zeros(5)
    tape, y = (torch.zeros(6, 15), torch.zeros(6, 5)), torch.zeros(6, 5)
    arguments = (False, rows, *case.weights[:2], torch.zeros(15), hidden, h0, None, *tape, y, None)
    torch.library.opcheck(torch.ops.statefeed.layer_forward.default, ("gru", *arguments))
    torch.library.opcheck(
        torch.ops.statefeed.layer_backward.default,
        ("gru", "stationary", 0, False, rows, *case.weights[:2], *tape, y, h0, None, case.e.reshape(6, 5), torch.zeros(2, 5),
         hidden, None, torch.zeros(2, 5), torch.zeros(6, 4), torch.zeros(15, 4), torch.zeros(15, 5),
         torch.zeros(4, 5), None),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.statefeed.sum_jacobians.default,
        ("gru", *tape, y, h0, None, torch.zeros(3, 5), None, torch.zeros(5)),
    )


class Outputs(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        case = Case("gru", 4, 64, 64, 64, torch.float32)
        return layer.forward("gru", case.x, case.state, case.weights)[0]

    def __len__(self) -> int:
        return 2


def test_a_forked_worker_does_not_hang() -> None:
    Case("gru", 4, 64, 64, 64, torch.float32).run("gate")
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
for _ in range(20):  # past the point where the kernels take the machine for crowded
    layer.zero_grad()
    layer(x)[0].square().sum().backward()
    print(hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in layer.parameters())).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to a core here")
def test_threads_that_come_late_change_no_bit() -> None:
    def run(how: str) -> list[str]:
        return subprocess.check_output([sys.executable, "-c", LATE, how], text=True, timeout=60).split()

    found = run("late") + run("free")
    assert len(found) == 40
    assert len(set(found)) == 1
