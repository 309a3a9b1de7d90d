"""A cell, three rules, a backend and a recipe option from outside the package, as docs/extending.md adds them."""

import contextlib
import copy
import inspect
import io
import math
import re
from typing import NamedTuple

import oracles
import pytest
import tables
import torch
from test_docs import TEXTS, run_blocks
from tolerances import SAME_BY_CANCELLATION, assert_different, assert_same
from torch import Tensor, nn
from torch.func import jacrev, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import statefeed as sf
from statefeed.backends import BACKENDS, choose
from statefeed.cell_layer import CellLayer
from statefeed.cells import CELLS, Cell
from statefeed.cells.protocol import w_hh_diagonal
from statefeed.conversions import CONVERSIONS
from statefeed.feedback import DIAGONALS
from statefeed.lm import config, identity, recipe
from statefeed.lm.errors import UsageError
from statefeed.lm.model.blocks import BLOCKS, LAYERS
from statefeed.scan import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:the initial state", "ignore:feedback .* adds corrections")

I, H, B, T = 3, 4, 3, 6


@pytest.fixture(scope="module")
def page():
    """What the blocks of the page define and print; the tables have their members in this file only."""
    printed = io.StringIO()
    with tables.restored():
        with contextlib.redirect_stdout(printed):
            found = run_blocks("extending")
        yield {**found, "printed": printed.getvalue()}


# A cell whose state has two parts, as the page has none --------------------------------------------------------------


class TwoPartSaved(NamedTuple):
    f: Tensor
    g: Tensor
    h: Tensor
    c_prev: Tensor


class TwoPart(Cell):
    """c = f c' + (1 - f) g, h = tanh(c); gates f, g."""

    name = "two_part"
    gates = 2
    shared_gates = 2
    states = ("h", "c")
    saved_type = TwoPartSaved

    def step(self, inputs, hidden, previous):
        f, g = self.activations(inputs, hidden)
        c = f * previous[1] + (1 - f) * g
        return torch.tanh(c), c

    def activations(self, inputs, hidden):
        f, g = (inputs + hidden).chunk(2, -1)
        return torch.sigmoid(f), torch.tanh(g)

    def linearize(self, step):
        return TwoPartSaved(*self.activations(*step.preactivations()), step.after[0], step.previous[1])

    def local_gradient(self, at, delta):
        d_f = delta[1] * (at.c_prev - at.g) * at.f * (1 - at.f)
        d = torch.cat([d_f, delta[1] * (1 - at.f) * (1 - at.g**2)], -1)
        return d, d

    def same_step(self, at, grad_h):
        return ((1 - at.h**2) * grad_h,)

    def direct_path(self, at):
        return None, at.f

    def jacobian_diagonal(self, at, w_hh):
        through_f = (at.c_prev - at.g) * at.f * (1 - at.f) * w_hh_diagonal(w_hh, 0)
        through_g = (1 - at.f) * (1 - at.g**2) * w_hh_diagonal(w_hh, 1)
        return (1 - at.h**2) * (through_f + through_g), at.f


class TwoPartLayer(CellLayer):
    cell = TwoPart()


# The truth: the equations of one row, and autograd through a loop ----------------------------------------------------


def mgu_step(w, x, s):
    inputs, hidden = w["weight_ih"] @ x + w.get("bias_ih", 0.0), w["weight_hh"] @ s + w.get("bias_hh", 0.0)
    f = torch.sigmoid(inputs[:H] + hidden[:H])
    return (1 - f) * torch.tanh(inputs[H:] + f * hidden[H:]) + f * s


def two_part_step(w, x, s):
    a = w["weight_ih"] @ x + w.get("bias_ih", 0.0) + w["weight_hh"] @ s[:H] + w.get("bias_hh", 0.0)
    f = torch.sigmoid(a[:H])
    c = f * s[H:] + (1 - f) * torch.tanh(a[H:])
    return torch.cat([torch.tanh(c), c])


STEPS = {"mgu": mgu_step, "two_part": two_part_step}


def layer(page, cell, **options):
    torch.manual_seed(0)
    cls = page["MGU"] if cell == "mgu" else TwoPartLayer
    made = cls(I, H, **{"dtype": torch.float64} | options)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.5)
    return made


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_a_loop(made, x, initial, lengths):
    """y (T, B, H * directions), zero after the end, and the final states (L * directions, B, S), one row at a time."""
    step, directions = STEPS[made.cell.name], 2 if made.bidirectional else 1
    rows, finals = [], []
    for b, length in enumerate(lengths):
        inputs, final = x[:length, b], []
        for number in range(made.num_layers):
            outputs = []
            for k in range(directions):
                suffix = f"_l{number}{'_reverse' if k else ''}"
                w = oracles.weights_of(dict(made.named_parameters()), suffix)
                s, states = initial[number * directions + k, b], []
                for x_t in inputs.flip(0) if k else inputs:
                    s = step(w, x_t, s)
                    states.append(s[:H])
                outputs.append(torch.stack(states).flip(0) if k else torch.stack(states))
                final.append(s)
            inputs = torch.cat(outputs, -1)
        rows.append(torch.cat([inputs, inputs.new_zeros(len(x) - length, inputs.shape[1])]))
        finals.append(torch.stack(final))
    return torch.stack(rows, 1), torch.stack(finals, 1)


def joined(state):
    return state if isinstance(state, Tensor) else torch.cat(state, -1)


def parts(cell, state):
    return state if cell == "mgu" else tuple(part.contiguous() for part in state.chunk(2, -1))


def outputs_and_gradients(made, run, width):
    """Outputs, and the gradients of a fixed loss on all of them: of the weights, x and the initial state."""
    directions = 2 if made.bidirectional else 1
    x = random(T, B, I, seed=1).requires_grad_()
    initial = random(made.num_layers * directions, B, width, seed=2).requires_grad_()
    y, final = run(x, initial)
    made.zero_grad()
    ((y * random(*y.shape, seed=3)).sum() + (final * random(*final.shape, seed=4)).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in made.named_parameters()}
    return {"y": y, "final": final, **gradients, "x": x.grad, "initial": initial.grad}


def as_called(made, lengths, form):
    """The call of a layer in one of its input forms, with the outputs of ``in_a_loop``."""

    def run(x, initial):
        hx = parts(made.cell.name, initial)
        if form == "dense":
            y, final = made(x, hx)
        elif form == "packed":
            packed, final = made(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
            y, _ = nn.utils.rnn.pad_packed_sequence(packed, total_length=len(x))
        elif form == "lengths":
            y, final = made(x, hx, lengths=torch.tensor(lengths))
        else:
            y, final = made(x.transpose(0, 1), hx)
            y = y.transpose(0, 1)
        return y, joined(final)

    return run


def compare_with_autograd(made, form="dense"):
    lengths = (4, 6, 1) if form in ("packed", "lengths") else (T,) * B
    width = sum(made.cell.state_widths(H))
    expected = outputs_and_gradients(made, lambda x, initial: in_a_loop(made, x, initial, lengths), width)
    found = outputs_and_gradients(made, as_called(made, lengths, form), width)
    assert_same(found, expected, SAME_BY_CANCELLATION)


# A cell ---------------------------------------------------------------------------------------------------------------

EXACT = ["bptt", f"jacobian+{T}", f"gate+{T}", f"0.5+{T}", f"damped(0.9)+{T}", f"smoothed(0.9)+{T}", f"latest+{T}"]


@pytest.mark.parametrize("form", ["dense", "packed", "lengths", "batch_first"])
@pytest.mark.parametrize("rule", EXACT)
@pytest.mark.parametrize("cell", STEPS)
def test_exact_gradients_of_a_new_cell_are_autograds(page, cell, rule, form):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": form == "batch_first"}
    compare_with_autograd(layer(page, cell, feedback=rule, **options), form)


@pytest.mark.parametrize("cell", STEPS)
def test_a_new_cell_without_biases(page, cell):
    made = layer(page, cell, feedback="bptt", bias=False)
    assert list(made.state_dict()) == ["weight_ih_l0", "weight_hh_l0"]
    compare_with_autograd(made)


PLANTED = {
    "local_gradient": lambda right: lambda self, at, delta: tuple(1.01 * d for d in right(self, at, delta)),
    "direct_path": lambda right: lambda self, at: (None,),
    "linearize": lambda right: lambda self, step: right(self, step)._replace(h_prev=step.after[0]),
}


@pytest.mark.parametrize("function", PLANTED)
def test_a_wrong_formula_is_found(page, function):
    kind = type(page["MinimalGated"].__name__, (page["MinimalGated"],), {})
    setattr(kind, function, PLANTED[function](getattr(kind, function)))
    wrong = layer(page, "mgu", feedback="bptt")
    compare_with_autograd(wrong)
    wrong.__class__ = type("Wrong", (type(wrong),), {"cell": kind()})
    with pytest.raises(AssertionError, match="is allowed"):
        compare_with_autograd(wrong)


def states_of(step, w, x, initial):
    states = [initial]
    for x_t in x:
        states.append(torch.stack([step(w, row, s) for row, s in zip(x_t, states[-1], strict=True)]))
    return torch.stack(states)


def smoothed(diagonal):
    """The running mean over time with weight 0.1, from zero."""
    D = [torch.zeros_like(diagonal[0])]
    for now in diagonal:
        D.append(0.9 * D[-1] + 0.1 * now)
    return torch.stack(D[1:])


def of_the_equations(made, rule, corrections):
    """Gradients of one layer from the scan over D, the corrections and the local gradients, by the oracle's loops."""
    step, w = STEPS[made.cell.name], oracles.weights_of(dict(made.state_dict()), "_l0")
    x, initial = random(T, B, I, seed=1), random(1, B, made.diagonal_size, seed=2)[0]
    states = states_of(step, w, x, initial)
    J = torch.stack(
        [vmap(jacrev(lambda s, row: step(w, row, s)))(s, x_t) for s, x_t in zip(states[:-1], x, strict=True)]
    )
    diagonal = J.diagonal(dim1=-2, dim2=-1)
    D = {
        "jacobian": lambda: diagonal,
        "damped(0.9)": lambda: 0.9 * diagonal,
        "smoothed(0.9)": lambda: smoothed(diagonal),
        "latest": lambda: diagonal.mean((0, 1)),
        "halves(0.5)": lambda: torch.cat([torch.zeros(H // 2), torch.full((H // 2,), 0.5)]),
        "dsf": lambda: torch.linspace(0, 1, H, dtype=torch.float64),
    }[rule]()
    e = random(T, B, H, seed=3)
    e[-1] += random(1, B, H, seed=4)[0]
    delta, first = oracles.adjoint(e, J, torch.diag_embed(D.double().expand(T, B, H)), corrections)
    total, dx = {name: torch.zeros_like(value) for name, value in w.items()}, torch.zeros_like(x)
    for t in range(T):
        for b in range(B):
            _, back = vjp(lambda w, row, s=states[t, b]: step(w, row, s), w, x[t, b])
            dw, dx[t, b] = back(delta[t, b])
            total = {name: total[name] + dw[name] for name in total}
    return {**{f"{name}_l0": value for name, value in total.items()}, "x": dx, "initial": first[None]}


def of_the_layer(made):
    found = outputs_and_gradients(made, as_called(made, None, "dense"), H)
    return {name: value for name, value in found.items() if name not in ("y", "final")}


@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("rule", ["dsf", "jacobian", "halves(0.5)", "latest", "damped(0.9)", "smoothed(0.9)"])
def test_a_new_cell_follows_the_equations_of_every_rule(page, rule, corrections):
    made = layer(page, "mgu", feedback=f"{rule}+{corrections}")
    made.diagonal_size = H
    assert_same(of_the_layer(made), of_the_equations(made, rule, corrections))


def test_a_rule_over_time_follows_the_direction_and_the_lengths(page):
    both = layer(page, "mgu", bidirectional=True, feedback="smoothed(0.9)")
    one = layer(page, "mgu", feedback="smoothed(0.9)")
    one.load_state_dict({f"{name}_l0": getattr(both, f"{name}_l0_reverse") for name in both.cell.weight_names(True)})
    x, lengths = random(T, B, I, seed=1), [4, 6, 1]
    packed, _ = both(pack_padded_sequence(x, lengths, enforce_sorted=False))
    packed.data[:, H:].square().sum().backward()
    for b, length in enumerate(lengths):
        one(x[:length, b].flip(0))[0].square().sum().backward()
    found = {name: getattr(both, f"{name}_l0_reverse").grad for name in both.cell.weight_names(True)}
    assert_same(found, {name: getattr(one, f"{name}_l0").grad for name in found})


def test_a_rule_of_a_wrong_shape_is_an_error(page):
    def backward(made):
        made(torch.randn(2, 2, I))[0].sum().backward()

    short = type("Short", (page["Halves"],), {"vector": lambda self, size, dtype, device: torch.zeros(size - 1)})(0.5)
    for made in (page["MGU"](I, H, feedback=short), sf.GRU(I, H, feedback=short)):
        with pytest.raises(
            ValueError, match=r'^feedback "halves\(0\.5\)" must compute one value .* 4 here, got \(3,\)$'
        ):
            backward(made)
    one = type("One", (page["Damped"],), {"rows": lambda self, at: at.cell.jacobian_diagonal(at.at, at.w_hh)[:1]})(0.5)
    with pytest.raises(
        ValueError, match=r"^rows of .* must have the shapes \[\(4, 4\), \(4, 4\)\] or None, got \[\(4, 4\)\]$"
    ):
        backward(sf.LSTM(I, H, feedback=one))


def test_a_wrong_diagonal_is_found(page):
    made = layer(page, "mgu", feedback="jacobian")
    made.diagonal_size = H
    right = page["MinimalGated"].jacobian_diagonal
    kind = type("Kind", (page["MinimalGated"],), {"jacobian_diagonal": lambda *a: (1.01 * right(*a)[0],)})
    made.__class__ = type("Wrong", (type(made),), {"cell": kind()})
    with pytest.raises(AssertionError, match="is allowed"):
        assert_same(of_the_layer(made), of_the_equations(made, "jacobian", 0))


@pytest.mark.parametrize("rule", ["dsf", "jacobian", "gate"])
def test_a_rule_without_corrections_is_an_approximation(page, rule):
    found, exact = (layer(page, "mgu", feedback=name) for name in (rule, "bptt"))
    assert_different(of_the_layer(found), of_the_layer(exact))


@pytest.mark.parametrize("cell", STEPS)
def test_an_exact_pass_of_a_fit_is_exact(page, cell):
    compare_with_autograd(layer(page, cell, num_layers=2, bidirectional=True, feedback="fitted"), "packed")


# The layer around it --------------------------------------------------------------------------------------------------


def test_a_layer_has_the_constructor_and_the_parameters_of_torchs_gru(page):
    ours, theirs = inspect.signature(page["MGU"]), inspect.signature(sf.GRU)
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]
    options = {"num_layers": 2, "bidirectional": True}
    assert list(page["MGU"](I, H, **options).state_dict()) == list(nn.GRU(I, H, **options).state_dict())
    made = page["MGU"](I, 400, dtype=torch.float64)
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    for weight in made.parameters():
        assert 0.9 / math.sqrt(400) < float(weight.detach().abs().max()) <= 1 / math.sqrt(400)


def test_a_layer_prints_what_differs_from_the_defaults(page):
    made = page["MGU"](I, H, 2, False, True, 0.1, True, feedback="gate+1")
    assert repr(made) == (
        "MGU(3, 4, num_layers=2, bias=False, batch_first=True, dropout=0.1, bidirectional=True, feedback='gate+1')"
    )


def test_state_dicts_and_copies(page):
    made, other = (layer(page, "mgu", num_layers=2, feedback=rule) for rule in ("dsf", "latest"))
    nn.init.zeros_(other.weight_hh_l1)
    other.load_state_dict(made.state_dict(), strict=True)
    x = random(T, B, I)
    assert torch.equal(made(x)[0], other(x)[0])
    made(x)[0].sum().backward()
    again = copy.deepcopy(made)
    assert torch.equal(again(x)[0], made(x)[0])


@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input_steps_and_no_grad(page, cell, batch_first):
    made = layer(page, cell, num_layers=2, batch_first=batch_first)
    x = random(T, B, I)
    given = x.transpose(0, 1) if batch_first else x
    y, final = made(given)
    with torch.no_grad():
        without, last = made(given)
    assert torch.equal(without, y)
    assert torch.equal(joined(last), joined(final))
    one, one_final = made(x[:, 1])
    assert_same(
        {"y": one, "final": joined(one_final)}, {"y": (y[1] if batch_first else y[:, 1]), "final": joined(final)[:, 1]}
    )
    state = None
    for t in range(T):
        step, state = made.step(x[t], state)
    assert_same({"y": step, "final": joined(state)}, {"y": y[:, -1] if batch_first else y[-1], "final": joined(final)})


def test_a_reset_begins_a_new_sequence(page):
    made = layer(page, "two_part", bidirectional=True, feedback="bptt")
    x, resets = random(T, B, I), torch.zeros(T, B, dtype=torch.bool)
    resets[2, 1] = True
    y, _ = made(x, resets=resets)
    first, second = made(x[:2, 1:2])[0], made(x[2:, 1:2])[0]
    assert_same({"y": y[:, 1:2]}, {"y": torch.cat([first, second])})
    assert_same({"y": y[:, :1]}, {"y": made(x[:, :1])[0]})


def test_dropout_acts_between_layers_in_training(page):
    made = layer(page, "mgu", num_layers=2, dropout=0.5)
    x = random(T, B, I)
    assert not torch.equal(made(x)[0], made(x)[0])
    made.eval()
    assert torch.equal(made(x)[0], made(x)[0])
    with pytest.warns(UserWarning, match="dropout acts between layers"):
        page["MGU"](I, H, dropout=0.5)


WRONG_SIZES = [{"hidden_size": 0}, {"input_size": -1}, {"num_layers": 0}, {"num_layers": 2.0}, {"dropout": 1.5}]


@pytest.mark.parametrize("wrong", WRONG_SIZES)
def test_a_wrong_argument_raises(page, wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be .* got"):
        page["MGU"](**{"input_size": I, "hidden_size": H} | wrong)


def test_a_wrong_input_raises(page):
    made = layer(page, "mgu")
    with pytest.raises(RuntimeError, match="3 features per step"):
        made(random(T, B, I + 1))
    with pytest.raises(ValueError, match="dtype of the weights"):
        made(random(T, B, I).float())
    with pytest.raises(RuntimeError, match=r"hx must have the shape \(1, 3, 4\), got"):
        made(random(T, B, I), random(1, B + 1, H))
    with pytest.raises(ValueError, match="3D, got 4D"):
        made(random(1, T, B, I))
    with pytest.raises(TypeError, match=r"must be a pair \(h, c\)"):
        layer(page, "two_part")(random(T, B, I), random(1, B, H))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_unsupported_uses_of_a_new_cell_raise(page):
    made = layer(page, "mgu", feedback="bptt")
    with pytest.raises(ValueError, match='"bptt"'):
        made.feedback = "torch"
    y, _ = made(random(T, B, I))
    (gradient,) = torch.autograd.grad(y.square().sum(), made.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.script(made)


def test_a_new_cell_in_the_rest_of_the_package(page):
    model = nn.Sequential(layer(page, "mgu", feedback="dsf"))
    sf.Schedule("gate@0.5/bptt").apply(model, 0.75)
    assert model[0].feedback == sf.Feedback("bptt")
    model[0].feedback = "jacobian"
    x = random(T, B, I)
    found = sf.alignment(model, lambda model, x: model(x)[0].square().sum(), x)
    assert 0 < found.total.cosine < 1
    assert "warning" in str(sf.explain(model[0], x[:1]))
    assert sf.explain(model[0], x, timed=True).torch_seconds is None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("rule", ["dsf", "jacobian+1", "bptt"])
def test_a_new_cell_is_one_graph_when_compiled(page, rule):
    torch._dynamo.reset()
    made = layer(page, "two_part", num_layers=2, feedback=rule)
    answers = []
    with tables.only("reference"):
        for call in (made, torch.compile(made, backend="aot_eager", fullgraph=True)):
            x = random(T, B, I).requires_grad_()
            made.zero_grad()
            y, _ = call(x)
            y.square().sum().backward()
            answers.append({"y": y, "x": x.grad, **{name: p.grad.clone() for name, p in made.named_parameters()}})
    assert_same(*answers)


def test_a_new_cell_is_exported(page):
    made = layer(page, "mgu", num_layers=2)
    x = random(T, B, I)
    with tables.only("reference"), torch.no_grad():
        exported = torch.export.export(made, (x,)).module()
    assert_same({"y": exported(x)[0]}, {"y": made(x)[0]})


# Rules ----------------------------------------------------------------------------------------------------------------

TORCH_CELLS = {"gru": sf.GRU, "lstm": sf.LSTM, "tanh": sf.RNN}


def toy_diagonal(rule, cell, w, x, states):
    diagonal = oracles.diagonals(cell, w, x, states, "jacobian")
    size = diagonal.shape[-1]
    return {
        "halves(0.5)": torch.cat([torch.zeros(size // 2), torch.full((size // 2,), 0.5)]).double(),
        "latest": diagonal.mean((0, 1)),
        "damped(0.9)": 0.9 * diagonal,
    }[rule]


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("rule", ["halves(0.5)", "latest", "damped(0.9)"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_a_new_rule_follows_its_equations_on_every_backend(page, cell, rule, corrections, backend):
    device = "cuda" if backend == "triton" else "cpu"
    torch.manual_seed(0)
    made = TORCH_CELLS[cell](I, H, feedback=f"{rule}+{corrections}", dtype=torch.float64)
    x, h = random(T, B, I, seed=1), random(1, B, H, seed=2)
    initial = torch.cat([h, random(1, B, H, seed=5)], -1) if cell == "lstm" else h
    e = torch.zeros(T, B, initial.shape[-1], dtype=torch.float64)
    e[..., :H] = random(T, B, H, seed=3)
    w = oracles.weights_of(dict(made.state_dict()), "_l0")
    D = toy_diagonal(rule, cell, w, x, oracles.run(cell, w, x, initial[0]))
    expected = oracles.layer_gradients(cell, w, x, initial[0], e, (D, corrections))

    with tables.only(backend):
        made.to(device)
        leaves = [t.to(device).requires_grad_() for t in (x, initial)]
        if reason := BACKENDS[backend].unsupported_reason(made.feedback_cell, [leaves[0], *made.parameters()], False):
            pytest.skip(reason)
        y, _ = made(leaves[0], leaves[1] if cell != "lstm" else tuple(s.contiguous() for s in leaves[1].chunk(2, -1)))
        (y * e[..., :H].to(device)).sum().backward()
    found = {name.removesuffix("_l0"): p.grad.cpu() for name, p in made.named_parameters()}
    assert_same({**found, "x": leaves[0].grad.cpu(), "initial": leaves[1].grad[0].cpu()}, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("rule", ["halves(0.5)+1", "damped(0.9)", "damped(0.9)+1"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_a_new_rule_is_the_same_packed_and_in_both_directions(page, cell, rule, backend):
    """Every sequence alone is the truth for a packed batch, the reversed sequence for the reverse direction."""
    torch.manual_seed(0)
    made = TORCH_CELLS[cell](I, H, bidirectional=True, feedback=rule, dtype=torch.float64)
    one = TORCH_CELLS[cell](I, H, feedback=rule, dtype=torch.float64)
    x, lengths, weights = random(T, B, I), (4, 6, 1), random(T, B, 2 * H, seed=1)
    with tables.only(backend):
        if reason := BACKENDS[backend].unsupported_reason(made.feedback_cell, [x, *made.parameters()], False):
            pytest.skip(reason)
        y, _ = made(pack_padded_sequence(x, lengths, enforce_sorted=False))
        y, _ = nn.utils.rnn.pad_packed_sequence(y, total_length=T)
        (y * weights).sum().backward()
        expected = {name: torch.zeros_like(p) for name, p in made.named_parameters()}
        for k, suffix in enumerate(("", "_reverse")):
            one.load_state_dict({name: made.state_dict()[name + suffix] for name in one.state_dict()})
            for b, length in enumerate(lengths):
                inputs, part = x[:length, b : b + 1], weights[:length, b : b + 1, k * H : (k + 1) * H]
                one.zero_grad()
                (one(inputs.flip(0) if k else inputs)[0] * (part.flip(0) if k else part)).sum().backward()
                for name, p in one.named_parameters():
                    expected[name + suffix] += p.grad
    assert_same({name: p.grad for name, p in made.named_parameters()}, expected)


def test_a_user_defined_learned_rule_is_stored_and_frozen_like_the_others(page):
    made = layer(page, "mgu", num_layers=2, feedback="latest")
    x = random(T, B, I)
    made(x)[0].sum().backward()
    assert made.diagonal.shape == (2, H)
    assert made.diagonal_updates.tolist() == [1, 1]
    before = made.diagonal.clone()
    made.eval()
    made(2 * x)[0].sum().backward()
    assert torch.equal(made.diagonal, before)
    assert "diagonal" not in made.state_dict()


def test_rules_are_spelled_as_they_are_printed(page):
    for spelling in ("halves(0.5)", "latest+2", "damped(0.9)+1"):
        assert str(sf.Feedback(spelling)) == spelling
        assert sf.Feedback(spelling) == sf.Feedback(str(sf.Feedback(spelling)))
    with pytest.raises(ValueError, match="needs a number"):
        sf.Feedback("halves")
    with pytest.warns(UserWarning, match="binom"):
        sf.Feedback("halves(0.95)+1")


def test_a_users_cell_runs_under_the_new_stationary_and_learned_rules(page):
    x = random(T, B, I)
    for rule in ("halves(0.5)+1", "latest"):
        made = sf.Recurrent(nn.GRUCell(I, H, dtype=torch.float64), feedback=rule)
        made(x)[0].sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in made.parameters())
    with pytest.raises(ValueError, match="needs the formulas of a cell"):
        sf.Recurrent(nn.GRUCell(I, H), feedback="damped(0.9)")


# A backend, a recipe option, and the tables ---------------------------------------------------------------------------


def test_the_new_backend_runs_what_it_supports_and_nothing_else(page):
    counted, made = page["counted"], layer(page, "mgu", feedback="halves(0.5)")
    counted.clear()
    made(random(T, B, I))[0].sum().backward()
    assert counted == ["forward", "stationary"]
    with torch.no_grad():
        made(random(T, B, I))
    assert counted == ["forward", "stationary", "forward"]
    sf.GRU(I, H)(torch.zeros(T, B, I))[0].sum().backward()
    layer(page, "two_part")(random(T, B, I))[0].sum().backward()
    assert len(counted) == 3
    assert choose(CELLS["mgu"], [torch.zeros(1)] * 3, False).name == "counting"
    assert choose(CELLS["gru"], [torch.zeros(1)] * 3, False).name != "counting"


def test_the_new_backend_computes_what_the_reference_does(page):
    made = layer(page, "mgu", bidirectional=True, feedback="damped(0.9)+1")
    found = of_the_layer(made)
    with tables.only("reference"):
        assert_same(found, of_the_layer(made))


@pytest.mark.parametrize("rule", ["bptt", "jacobian+7", "dsf"])
def test_a_converted_loop_has_the_gradient_of_its_rule(page, rule):
    torch.manual_seed(0)
    found, x = {}, torch.randn(7, 2, 4)
    module = page["LoopRNN"](4)
    for name in ("loop", rule):
        module.zero_grad()
        with tables.restored():
            CONVERSIONS[f"{type(module).__module__}.LoopRNN"] = page["ConvertedRNN"]
            if name == rule:
                sf.swap(module, rule)
        module(x).square().sum().backward()
        found[name] = {"maps": module.maps.grad.clone()}
    if rule == "dsf":
        assert_different(found[rule], found["loop"])
    else:
        assert_same(found[rule], found["loop"], 1e-5)


def test_the_new_recipe_option_is_a_flag_and_a_key_that_is_checked(page, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("train:\n  smoothing: 0.25\n")
    built = recipe.load(file)
    assert built.train.smoothing == 0.25
    assert "smoothing: 0.25" in built.to_yaml()
    assert "train.smoothing" in identity.keys("run")
    assert "mean over all types" in recipe.parser("train").format_help()
    with pytest.raises(UsageError, match=r"^train\.smoothing must be at least 0 and below 1, got 2\.0$"):
        recipe.build(recipe.parse(recipe.parser("train"), ["--train.smoothing=2"]))


def test_the_new_sequence_layer_and_block_are_options_of_the_trainer(page):
    built = recipe.build(recipe.parse(recipe.parser("train"), page["flags"]))
    assert built.model.cell == "mgu"
    assert "block: double" in built.to_yaml()
    assert identity.rule("mgu", "smoothed(0.9)+1") == "smoothed(0.9)+1"
    block, x = page["model"].blocks[0].eval(), torch.randn(T, B, 8)
    assert_same({"y": block(x, None, None)[0]}, {"y": x + 2 * block.rnn(x)[0]}, 1e-5)
    with pytest.raises(UsageError, match=r"model\.block.*dubble"):
        recipe.parse(recipe.parser("train"), ["--model.block=dubble"])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_new_scan_has_both_directions_and_the_gradient(page, reverse):
    x, initial = random(T, B, I, seed=1).requires_grad_(), random(B, I, seed=2).requires_grad_()
    a = torch.tensor([0.0, 0.9, -0.5], dtype=torch.float64, requires_grad=True)

    def scan(*arguments):
        return sf.diagonal_scan(arguments[0], arguments[1], reverse, arguments[2], "triangular")

    y, states = initial, []
    for x_t in x.flip(0) if reverse else x:
        y = a * y + x_t
        states.append(y)
    assert_same({"y": scan(x, a, initial)}, {"y": torch.stack(states[::-1] if reverse else states)})
    assert torch.autograd.gradcheck(scan, (x, a, initial))
    with pytest.raises(ValueError, match="needs a stationary diagonal"):
        scan(x, torch.ones_like(x), initial)
    with pytest.raises(
        ValueError, match=r'one of "auto", "sequential", "prefix", "fft", "triangular", got \'blocks\'$'
    ):
        sf.diagonal_scan(x, a, method="blocks")


def test_the_page_prints_what_its_comments_say(page):
    commented = re.findall(r"^print\(.*\)  # (.*)$", TEXTS["extending"], re.MULTILINE)
    assert commented
    assert page["printed"].splitlines() == commented


def test_the_tables_are_restored():
    every = (CELLS, DIAGONALS, BACKENDS, CONVERSIONS, METHODS, config.SECTIONS, config.RECURRENT, LAYERS, BLOCKS)
    before = [list(table) for table in every]
    with tables.restored():
        run_blocks("extending")
        assert {"mgu"} <= set(CELLS)
        assert {"halves", "latest", "damped"} <= set(DIAGONALS)
        assert next(iter(BACKENDS)) == "counting"
        assert any("LoopRNN" in name for name in CONVERSIONS)
        assert "mgu" in LAYERS
        assert "triangular" in METHODS
    assert [list(table) for table in every] == before
