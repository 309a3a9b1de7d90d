"""The GPU kernels of the sLSTM and of block-diagonal recurrent weights, in Triton's interpreter or on a GPU.

The truth is the PyTorch path in float64, which tests/test_slstm.py compares with loops, and these loops themselves.
"""

import oracles
import pytest
import torch
from test_kernels_slstm import SLSTM, Case
from tolerances import SAME_BY_CANCELLATION, assert_as_accurate, assert_different, assert_same
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import statefeed as sf
from statefeed import stack
from statefeed.backends import BACKENDS, Problem, Upstream, reference
from statefeed.feedback.protocol import KernelRule
from statefeed.layout import Layout

pytest.importorskip("triton", reason="Triton is not installed")

from statefeed.backends.triton import launches, reverse
from statefeed.backends.triton.cells import CELLS as KERNELS
from statefeed.scan import chunks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the cases are CPU tensors, for the interpreter")

BACKEND = BACKENDS["triton"]
RULES = [("stationary", 0), ("stationary", 1), ("per_row", 0), ("per_row", 2), ("direct", 1), ("jacobian", 0)]
RULES += [("jacobian", 2)]
# T, B, I, H, heads; chunks have two steps.
SHAPES = [(1, 2, 1, 1, 1), (2, 3, 4, 4, 4), (3, 3, 5, 5, 1), (7, 3, 2, 6, 2), (8, 2, 3, 8, 4)]


@pytest.fixture(params=["whole", "chunked"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "chunked":
        monkeypatch.setattr(chunks, "steps", lambda *_: 2)


def names(rule: tuple[str, int]) -> str:
    return f"{rule[0]}+{rule[1]}"


@pytest.mark.parametrize("rule", RULES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", SLSTM)
@pytest.mark.usefixtures("chunking")
def test_every_rule_equals_the_reference(cell: str, shape: tuple[int, ...], rule: tuple[str, int]) -> None:
    case = Case(cell, *shape)
    assert_same(case.run(rule, BACKEND), case.run(rule, reference.BACKEND), SAME_BY_CANCELLATION)


@pytest.mark.parametrize("rule", RULES, ids=names)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("chunking")
def test_the_reverse_direction_and_packed_rows(packed: bool, heads: int, rule: tuple[str, int]) -> None:
    case, lengths = Case("slstm", 6, 4, 2, 6, heads), [6, 3, 3, 1] if packed else None
    for backwards in (False, True):
        expected = case.run(rule, reference.BACKEND, lengths, reverse=backwards)
        assert_same(case.run(rule, BACKEND, lengths, reverse=backwards), expected, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("rule", ["dsf", "gate", "jacobian"])
@pytest.mark.parametrize(("cell", "heads"), [("slstm", 2), ("slstm_exp", 1)])
@pytest.mark.usefixtures("chunking")
def test_every_rule_follows_its_equations(cell: str, heads: int, rule: str) -> None:
    case, weights = Case(cell, 5, 2, 2, 4, heads), ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    case.D["stationary"] = torch.linspace(0, 1, 12, dtype=torch.float64)
    e = torch.nn.functional.pad(case.e, (0, 12))
    e[-1, :, :12] += torch.cat(case.final_e, -1)
    w = dict(zip(weights, case.weights, strict=True))
    expected = oracles.layer_gradients(cell, w, case.x, torch.cat(case.state, -1), e, (rule, 1))
    expected["initial"] = expected["initial"][:, :12]
    kernel = {"dsf": "stationary", "gate": "direct"}.get(rule, rule)
    found = case.run((kernel, 1), BACKEND)
    found["initial"] = torch.cat([found[f"initial {k}"] for k in range(3)], -1)
    found["x"] = found["x"].view(case.x.shape)
    assert_same({name: found[name] for name in expected}, expected, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("wrong", ["c", "n", "the heads", "a carry between chunks"])
def test_planted_errors_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, rule = Case("slstm", 7, 3, 2, 6, 2), ("jacobian", 1)  # four chunks
    expected = case.run(rule, reference.BACKEND)
    monkeypatch.setattr(chunks, "steps", lambda *_: 2)
    assert_same(case.run(rule, BACKEND), expected, SAME_BY_CANCELLATION)
    right = KERNELS["slstm"]

    def factors(*arguments: object, **named: object) -> tuple[object, ...]:
        k, direct, through_h, jacobian = right.factors(*arguments, **named)
        if wrong == "c":
            direct = (direct[0], direct[1] * 1.01, direct[2])
        return k, direct, (through_h[0], -through_h[1]) if wrong == "n" else through_h, jacobian

    if wrong in ("c", "n"):
        monkeypatch.setitem(KERNELS, "slstm", right._replace(factors=factors))
    elif wrong == "the heads":
        monkeypatch.setattr(launches, "head_width", lambda w_hh, O: 2)
    else:
        lost = {(1, 4): lambda *arguments, **_: arguments[10].zero_()}
        monkeypatch.setattr(reverse, "summarize", lost)
    assert_different(case.run(rule, BACKEND), expected)


@pytest.mark.parametrize("cell", SLSTM)
@pytest.mark.usefixtures("chunking")
def test_float32_is_as_accurate_as_the_pytorch_path(cell: str) -> None:
    for rule in (("jacobian", 1), ("direct", 0), ("stationary", 0)):
        case = Case(cell, 17, 3, 2, 12, 2, torch.float32)
        found, expected = case.run(rule, BACKEND), case.run(rule, reference.BACKEND)
        assert_as_accurate(found, expected, case.to(torch.float64).run(rule, reference.BACKEND))


@pytest.mark.parametrize("cell", SLSTM)
def test_bfloat16_is_as_accurate_as_the_pytorch_path(cell: str) -> None:
    rule = ("direct", 1)
    case = Case(cell, 7, 3, 5, 12, 2, torch.bfloat16)
    found, expected = case.run(rule, BACKEND), case.run(rule, reference.BACKEND)
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    assert_as_accurate(found, expected, case.to(torch.float64).run(rule, reference.BACKEND))


def test_autocast_is_as_accurate_as_the_pytorch_path() -> None:
    for rule in (("direct", 1), ("stationary", 0)):
        case = Case("slstm", 9, 3, 5, 12, 2, torch.float32)
        found, expected = case.run(rule, BACKEND, bf16=True), case.run(rule, reference.BACKEND, bf16=True)
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
        assert_as_accurate(found, expected, case.to(torch.float64).run(rule, reference.BACKEND))


def test_large_gates_keep_the_gradient_finite() -> None:
    case = Case("slstm_exp", 6, 2, 3, 4, 2, torch.float32)
    case.weights[2] = case.weights[2] + torch.tensor([200.0, -150.0, 0, 0]).repeat_interleave(4)
    found, expected = case.run(("jacobian", 0), BACKEND), case.run(("jacobian", 0), reference.BACKEND)
    assert all(v.isfinite().all() for v in found.values())
    assert_same(found, expected, 1e-3)


def test_an_empty_batch() -> None:
    found = Case("slstm", 4, 0, 2, 4, 2).run(("direct", 1), BACKEND)
    assert found["x"].shape == (0, 2)
    assert not found["weight_hh"].any()


@pytest.mark.parametrize("saved", [True, False])
def test_preactivations_in_place_of_x_and_states_that_were_not_saved(saved: bool) -> None:
    case = Case("slstm", 5, 2, 12, 3, 3)
    weights = (torch.empty(0, dtype=torch.float64), *case.weights[1:])
    problem = Problem(case.cell, case.x.flatten(0, 1), case.state, weights, Layout(5, 2))
    upstream, found = Upstream(case.e.flatten(0, 1), case.final_e), []
    for backend in (BACKEND, reference.BACKEND):
        [done] = backend.forward([problem], True)
        done = backend.recompute(problem, done if saved else done._replace(saved=()))
        gradients = backend.backward(problem, done, upstream, KernelRule("jacobian", None, 1), True)
        found.append({str(k): v for k, v in enumerate([gradients.x, *gradients.state, *gradients.weights])})
    assert_same(*found, SAME_BY_CANCELLATION)


@pytest.mark.parametrize(("rule", "packed"), [("dsf", False), ("calibrated", True), ("gate+1", True)])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exponential"])
def test_layers_through_the_kernels_are_layers_through_pytorch(
    forget_gate: str, rule: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = sf.SLSTM(
        3, 4, 2, num_heads=2, forget_gate=forget_gate, bidirectional=True, dtype=torch.float64, feedback=rule
    )
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found: list[dict[str, Tensor]] = []
    for name in ("reference", "triton"):
        monkeypatch.setattr(stack, "choose", lambda *_, name=name: BACKENDS[name])
        batch = pack_sequence([x[:, 0], x[:3, 1]]) if packed else x
        if rule == "calibrated":
            model.diagonal.zero_(), model.diagonal_updates.zero_()
        y = model(batch)[0]
        loss = (y.data if packed else y).square().sum()
        gradients = torch.autograd.grad(loss, [x, *model.parameters()])
        found.append({str(k): v for k, v in enumerate(gradients)})
    assert_same(found[1], found[0], SAME_BY_CANCELLATION)


def test_a_gpu_takes_approximate_rules_and_says_why_not_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("slstm", 3, 2, 2, 4, 2)

    class OnGPU(Tensor):
        device = torch.device("cuda")

    tensors = [t.as_subclass(OnGPU) for t in (case.x, *case.state, *case.weights)]
    monkeypatch.setattr("statefeed.native.unavailable", lambda _: None)
    assert BACKEND.unsupported_reason(case.cell, tensors, False) is None
    assert BACKEND.unsupported_reason(case.cell, tensors, True) == "the Triton kernels have no exact BPTT"
