"""The sLSTM and block-diagonal recurrent weights on the CPU backend, against the reference and loops in float64."""

from collections.abc import Iterator

import oracles
import pytest
import torch
from tolerances import SAME_BY_CANCELLATION, assert_as_accurate, assert_different, assert_same, largest_error
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import statefeed as sf
from statefeed import native
from statefeed.backends import cpu, reference
from statefeed.backends.protocol import Backend, Problem, Upstream
from statefeed.cells import CELLS
from statefeed.feedback.protocol import KernelRule
from statefeed.layout import Layout

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")

NAMES = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
SLSTM = ["slstm", "slstm_exp"]
RULES = [("exact", 0), ("stationary", 0), ("stationary", 1), ("per_row", 1), ("direct", 0), ("jacobian", 2)]
# T, B, I, H, heads: of one unit; of odd sizes; of several vectors; of several chunks.
SHAPES = [
    (1, 1, 1, 1, 1),
    (9, 3, 5, 20, 4),
    (7, 19, 3, 66, 2),
    (5, 4, 17, 128, 4),
    (60, 17, 5, 36, 1),
    (60, 17, 5, 24, 2),
]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Case:
    """Random inputs of one layer; half of the sequences continue earlier ones, the others begin."""

    def __init__(self, cell: str, T: int, B: int, I: int, H: int, heads: int = 1, dtype: torch.dtype = torch.float64):
        make = torch.Generator().manual_seed(T + 10 * B + 100 * H + heads)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        self.cell, self.T, self.B, self.H = CELLS[cell], T, B, H
        parts = self.cell.gradient_parts
        self.x, self.e, self.final_e = normal(T, B, I), normal(T, B, H), tuple(normal(B, H) for _ in range(parts))
        self.state = tuple(normal(B, H) for _ in self.cell.states)
        for part, name in zip(self.state, self.cell.states, strict=True):
            if name == "n":
                part.abs_().add_(0.5)
            if cell in SLSTM and name != "h":
                part[::2] = 0
        shapes = [(4 * H, I), (4 * H, H // heads), (4 * H,), (4 * H,)]
        self.weights = [normal(*shape) / (H / heads) ** 0.5 for shape in shapes]
        S = parts * H
        self.D = {"stationary": torch.linspace(0, 0.9, S).double(), "per_row": normal(T, B, S).sigmoid()}
        self.to(dtype)

    def to(self, dtype: torch.dtype) -> "Case":
        self.x, self.e = self.x.to(dtype), self.e.to(dtype)
        self.state, self.final_e = (tuple(v.to(dtype) for v in p) for p in (self.state, self.final_e))
        self.weights = [w.to(dtype) for w in self.weights]
        return self

    def run(
        self,
        rule: tuple[str, int],
        backend: Backend = cpu.BACKEND,
        lengths: list[int] | None = None,
        bf16: bool = False,
        reverse: bool = False,
    ) -> dict[str, Tensor]:
        """Everything that a backend returns; sequences of ``lengths``, longest first, are packed."""
        name, corrections = rule
        rows, e, D = self.x.flatten(0, 1), self.e.flatten(0, 1), self.D.get(name)
        layout = Layout(self.T, self.B)
        if D is not None and name == "per_row":
            D = D.flatten(0, 1)
        if lengths is not None:

            def packed(v: Tensor) -> Tensor:
                return pack_sequence([v[:n, b] for b, n in enumerate(lengths)]).data

            layout = Layout(self.T, self.B, torch.tensor([sum(n > t for n in lengths) for t in range(self.T)]))
            rows, e = packed(self.x), packed(self.e)
            D = packed(self.D[name]) if name == "per_row" else D
        dtype = torch.bfloat16 if bf16 else None
        problem = Problem(self.cell, rows, self.state, tuple(self.weights), layout, reverse, dtype)
        [done] = backend.forward([problem], True)
        done = backend.recompute(problem, done)
        mean = backend.mean_jacobian(problem, done)
        D = None if D is None else D.to(self.x.dtype)
        found = backend.backward(problem, done, Upstream(e, self.final_e), KernelRule(name, D, corrections), True)
        values = {"y": done.y, "x": found.x, "mean": mean, **dict(zip(NAMES, found.weights, strict=True))}
        values |= {f"final {i}": v for i, v in enumerate(done.final)}
        return values | {f"initial {i}": v for i, v in enumerate(found.state)}


# The reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}+{rule[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", SLSTM)
@pytest.mark.usefixtures("threads")
def test_every_rule_equals_the_reference(cell: str, shape: tuple[int, ...], rule: tuple[str, int]) -> None:
    case = Case(cell, *shape)
    assert_same(case.run(rule), case.run(rule, reference.BACKEND), SAME_BY_CANCELLATION)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}+{rule[1]}")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("H", "heads"), [(6, 1), (20, 4), (64, 2)])
@pytest.mark.usefixtures("threads")
def test_packed_sequences_equal_the_reference(H: int, heads: int, reverse: bool, rule: tuple[str, int]) -> None:
    case, lengths = Case("slstm", 200, 5, 3, H, heads), [200, 90, 90, 3, 1]
    found, expected = (
        case.run(rule, backend, lengths, reverse=reverse) for backend in (cpu.BACKEND, reference.BACKEND)
    )
    assert_same(found, expected, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("rule", RULES[:2] + RULES[4:], ids=lambda rule: f"{rule[0]}+{rule[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", SLSTM)
@pytest.mark.usefixtures("threads")
def test_float32_is_as_accurate_as_the_reference(cell: str, shape: tuple[int, ...], rule: tuple[str, int]) -> None:
    case = Case(cell, *shape, dtype=torch.float32)
    found, theirs = case.run(rule), case.run(rule, reference.BACKEND)
    assert_as_accurate(found, theirs, case.to(torch.float64).run(rule, reference.BACKEND))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}+{rule[1]}")
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
@pytest.mark.parametrize("cell", SLSTM)
@pytest.mark.usefixtures("threads")
def test_bfloat16_products_have_the_accuracy_of_bfloat16(
    cell: str, shape: tuple[int, ...], rule: tuple[str, int]
) -> None:
    case = Case(cell, *shape, dtype=torch.float32)
    worst, name = largest_error(case.run(rule, bf16=True), case.run(rule))
    assert worst < 0.05, f"{name}: {worst:.1e}"


# Loops in float64 -----------------------------------------------------------------------------------------------------


def loop(case: Case, x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The equations of the sLSTM, one step and head after the other."""
    h, c, n, m = state
    w_ih, w_hh, b_ih, b_hh = weights
    width, outputs = w_hh.shape[1], []
    for x_t in x:
        pre = []
        for gate in w_hh.split(case.H):
            heads = zip(h.split(width, 1), gate.split(width), strict=True)
            pre.append(torch.cat([h_head @ w.T for h_head, w in heads], 1))
        pre_i, pre_f, pre_z, pre_o = (x_t @ w_ih.T + b_ih + torch.cat(pre, 1) + b_hh).chunk(4, 1)
        log_f = F.logsigmoid(pre_f) if case.cell.name == "slstm" else pre_f
        m_next = torch.where(n == 0, pre_i, torch.maximum(pre_i, log_f + m)).detach()
        i, f = torch.exp(pre_i - m_next), torch.exp(log_f + m - m_next).clamp(max=1)
        c, n, m = f * c + i * torch.tanh(pre_z), f * n + i, m_next
        h = torch.sigmoid(pre_o) * c / n
        outputs.append(h)
    return torch.stack(outputs), (h, c, n, m)


def of_the_loop(case: Case) -> dict[str, Tensor]:
    """What ``Case.run`` returns for the rule "exact", from autograd."""
    leaves = [v.clone().requires_grad_() for v in (case.x, *case.state[:3], *case.weights)]
    y, final = loop(case, leaves[0], (*leaves[1:4], case.state[3]), leaves[4:])
    loss = (y * case.e).sum() + sum((v * g).sum() for v, g in zip(final, case.final_e, strict=False))
    d_x, *grads = torch.autograd.grad(loss, leaves)
    values = {"y": y.detach().flatten(0, 1), "x": d_x.flatten(0, 1), **dict(zip(NAMES, grads[3:], strict=True))}
    values |= {f"final {i}": v.detach() for i, v in enumerate(final)}
    return values | {f"initial {i}": v for i, v in enumerate(grads[:3])}


@pytest.mark.parametrize(("H", "heads"), [(7, 1), (20, 4), (96, 2)])
@pytest.mark.parametrize("T", [1, 2, 33, 200])
@pytest.mark.parametrize("cell", SLSTM)
def test_exact_gradients_equal_those_of_a_loop(cell: str, T: int, H: int, heads: int) -> None:
    case = Case(cell, T, 3, 4, H, heads)
    expected, found = of_the_loop(case), case.run(("exact", 0))
    del found["mean"]
    assert_same(found, expected)
    if heads > 1:  # the blocks of another head
        case.weights[1] = case.weights[1].view(4, heads, -1).roll(1, 1).reshape(case.weights[1].shape)
        wrong = case.run(("exact", 0))
        assert_different({name: wrong[name] for name in expected}, expected)


@pytest.mark.parametrize("rule", [("direct", 1), ("jacobian", 0), ("stationary", 1), ("per_row", 0)])
@pytest.mark.parametrize("cell", SLSTM)
def test_rules_follow_their_equations(cell: str, rule: tuple[str, int]) -> None:
    case = Case(cell, 4, 2, 3, 9, 3)
    e = torch.cat([case.e, torch.zeros(4, 2, 27, dtype=torch.float64)], -1)
    e[-1, :, :27] += torch.cat(case.final_e, -1)
    D = {"direct": "gate", "jacobian": "jacobian"}.get(rule[0], case.D.get(rule[0]))
    w = dict(zip(NAMES, case.weights, strict=True))
    expected = oracles.layer_gradients(cell, w, case.x, torch.cat(case.state, -1), e, (D, rule[1]))
    expected["initial"] = expected["initial"][:, :27]
    found = case.run(rule)
    found["initial"], found["x"] = torch.cat([found[f"initial {i}"] for i in range(3)], -1), found["x"].view_as(case.x)
    assert_same({name: found[name] for name in expected}, expected)


# Numbers --------------------------------------------------------------------------------------------------------------


def log_forget(pre_f: Tensor) -> Tensor:
    """The m of one step where the input gate is closed: the logarithm of the forget gate, plus the m before."""
    H = len(pre_f)
    bias = torch.cat([torch.full_like(pre_f, -1000), pre_f, torch.zeros(2 * H, dtype=pre_f.dtype)])
    zero, one = torch.zeros(1, H, dtype=pre_f.dtype), torch.ones(1, H, dtype=pre_f.dtype)
    weights = torch.zeros(4 * H, 1, dtype=pre_f.dtype), torch.zeros(4 * H, H, dtype=pre_f.dtype), bias, bias * 0
    problem = Problem(CELLS["slstm"], zero[:, :1], (zero, zero, one, zero), weights, Layout(1, 1))
    return cpu.forward([problem], False)[0].final[3][0]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 86.0), (torch.float64, 700.0)])
def test_the_logarithm_of_the_forget_gate_is_accurate(dtype: torch.dtype, largest: float) -> None:
    x = torch.cat([torch.linspace(-largest, largest, 501), torch.linspace(-2, 2, 500), torch.tensor([0.0, 1e-6])])
    x = x.to(dtype)
    expected = F.logsigmoid(x.double())
    error = (log_forget(x).double() - expected).abs() / expected.abs()
    assert error.max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_the_range_of_exp_the_logarithm_is_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([-900.0, -100.0, 100.0, 1e4, 1e30], dtype=dtype)
    assert_same({"log f": log_forget(x).double()}, {"log f": F.logsigmoid(x.double())}, 1e-30)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}+{rule[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", SLSTM)
def test_preactivations_of_100(cell: str, dtype: torch.dtype, rule: tuple[str, int]) -> None:
    case = Case(cell, 9, 4, 6, 20, 4)
    case.x, case.weights[0] = case.x.sign(), case.weights[0].sign() * (100 / 6)
    case.to(dtype)
    found, theirs = case.run(rule), case.run(rule, reference.BACKEND)
    assert all(v.isfinite().all() for v in found.values())
    if dtype == torch.float64:
        assert_same(found, theirs)
    else:
        assert_as_accurate(found, theirs, case.to(torch.float64).run(rule, reference.BACKEND))


def test_nan_reaches_its_sequence_only() -> None:
    case = Case("slstm", 3, 2, 4, 12, 2)
    case.x[1, 0, 0] = float("nan")
    y = case.run(("direct", 0))["y"].view_as(case.e)
    assert y[1:, 0].isnan().all()
    assert not y[:1].isnan().any()
    assert not y[:, 1].isnan().any()


# What a forward pass saves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("cell", SLSTM)
@pytest.mark.usefixtures("threads")
def test_without_autograd_nothing_is_saved_and_the_bits_are_equal(cell: str, heads: int, bf16: bool) -> None:
    case = Case(cell, 30, 17, 5, 64, heads, torch.float32)
    dtype = torch.bfloat16 if bf16 else None
    problem = Problem(case.cell, case.x.flatten(0, 1), case.state, tuple(case.weights), Layout(30, 17), False, dtype)
    saving, plain = (cpu.forward([problem], save)[0] for save in (True, False))
    assert sum(v.shape[1] for v in saving.saved) == case.cell.saved_values * case.H
    assert plain.saved == ()
    assert all(torch.equal(a, b) for a, b in zip((saving.y, *saving.final), (plain.y, *plain.final), strict=True))
    assert [s.shape for s in plain.final] == [(17, 64)] * 4
    assert torch.equal(plain.y[-17:], plain.final[0])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", ["bptt", "dsf", "jacobian+1"])
@pytest.mark.usefixtures("threads")
def test_the_same_call_gives_the_same_bits(rule: str, bf16: bool) -> None:
    torch.manual_seed(0)
    layer, x = sf.SLSTM(32, 64, num_heads=4, feedback=rule), torch.randn(60, 16, 32)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)

    def results() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y, state = layer(leaf)
        (y.square().sum() + state[1].sum()).backward()
        return [y.detach(), *(s.detach() for s in state), leaf.grad, *(p.grad.clone() for p in layer.parameters())]

    expected = results()
    for _ in range(3):
        torch.testing.assert_close(results(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("B", [1, 3])
def test_final_states_are_modified_in_place_like_those_of_an_lstm(B: int) -> None:
    layer = sf.SLSTM(3, 8, num_heads=2)
    y, state = layer(torch.randn(5, B, 3))
    for part in state:
        part.mul_(0.5)
    assert torch.equal(state[0][0], y[-1].detach() / 2)
    (y.sum() + sum(part.sum() for part in state[:3])).backward()


@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0)])
def test_empty_inputs(T: int, B: int) -> None:
    case = Case("slstm", T, B, 2, 6, 2)
    problem = Problem(case.cell, case.x.flatten(0, 1), case.state, tuple(case.weights), Layout(T, B))
    [done] = cpu.forward([problem], True)
    upstream = Upstream(case.e.flatten(0, 1), case.final_e)
    found = cpu.backward(problem, done, upstream, KernelRule("direct", None, 1), True)
    assert done.y.shape == (T * B, 6)
    assert all(torch.equal(a, b) for a, b in zip(done.final, case.state, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.state, case.final_e, strict=True))
    assert not any(w.any() for w in found.weights)


# Block-diagonal weights of any cell -----------------------------------------------------------------------------------


def dense(blocks: Tensor, H: int) -> Tensor:
    """Block-diagonal weights with their zeros."""
    width = blocks.shape[1]
    return torch.cat([torch.block_diag(*gate.split(width)) for gate in blocks.split(H)])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}+{rule[1]}")
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[4] > 1], ids=str)
@pytest.mark.usefixtures("threads")
def test_heads_of_an_lstm_equal_a_dense_lstm(shape: tuple[int, ...], rule: tuple[str, int], bf16: bool) -> None:
    """Also in bfloat16, where only the order of the sums differs."""
    case = Case("lstm", *shape, dtype=torch.float32 if bf16 else torch.float64)
    found, H = case.run(rule, bf16=bf16), case.H
    blocks = case.weights[1]
    case.weights[1] = dense(blocks, H)
    expected = case.run(rule, bf16=bf16)
    found["weight_hh"] = dense(found["weight_hh"], H)
    expected["weight_hh"] *= dense(torch.ones_like(blocks), H)
    assert_same(found, expected, 1e-2 if bf16 else SAME_BY_CANCELLATION)
