"""SLSTM: gradients of every rule, the first step, the form of the xlstm package, and operations on layers."""

import oracles
import pytest
import torch
from tolerances import SAME_BY_CANCELLATION, assert_different, assert_same
from torch import nn

import statefeed as sf

pytestmark = pytest.mark.filterwarnings("ignore:the initial state", "ignore:feedback .* adds corrections")

T, B, I, H = 6, 3, 3, 4
CELLS = {"slstm": "sigmoid", "slstm_exp": "exponential"}
RULES = ["bptt", "ft-bptt", "dsf", "log_spaced(9)", "0.5", "calibrated", "fitted", "gate", "jacobian"]


def layer(cell, **options):
    """A layer with weights large enough that every term matters."""
    torch.manual_seed(0)
    made = sf.SLSTM(I, H, **{"forget_gate": CELLS[cell], "dtype": torch.float64} | options)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.6)
    return made


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def initial_state(rows, started):
    """(4, rows, B, H): c, n and m of the first row are zero, of the others too unless ``started``."""
    state = random(4, rows, B, H, seed=1)
    state[2] = state[2].abs() + 0.5
    state[1:, :, : 1 if started else B] = 0
    return state


def of_the_layer(made, state, x=None):
    """Outputs, and gradients of a fixed loss on all of them: of the weights, x and the initial state."""
    x = (random(T, B, I, seed=2) if x is None else x).requires_grad_()
    hx = [s.clone().requires_grad_() for s in state]
    made.zero_grad()
    y, final = made(x, tuple(hx))
    grads = [random(*v.shape, seed=3 + n) for n, v in enumerate((y, *final[:3]))]
    sum((v * g).sum() for v, g in zip((y, *final[:3]), grads, strict=True)).backward()
    found = {name: p.grad for name, p in made.named_parameters()}
    return {"y": y, "final": torch.cat(final, -1), **found, "x": x.grad, "initial": torch.cat([s.grad for s in hx], -1)}


def of_the_equations(made, state, rule, x=None, cell=None):
    """The same from the oracle's loops, every sequence alone."""
    directions = 2 if made.bidirectional else 1
    x = random(T, B, I, seed=2) if x is None else x.detach()
    e = [random(*shape, seed=3 + n) for n, shape in enumerate([(T, B, H * directions), *[state.shape[1:]] * 3])]
    final = torch.cat([*e[1:], torch.zeros_like(e[1])], -1)
    initial = torch.cat(list(state), -1)
    cell = cell or made.feedback_cell.name
    found = oracles.network(
        cell, dict(made.state_dict()), list(x.unbind(1)), initial, list(e[0].unbind(1)), final, rule
    )
    return {
        "y": torch.stack(found.outputs, 1),
        "final": found.final,
        "x": torch.stack(found.inputs, 1),
        **found.gradients,
    }


def of_the_oracle(name, corrections):
    """A rule as the oracle takes it."""
    if name in ("bptt", "fitted"):  # whose first pass is exact
        return None
    fixed = sf.Feedback(name).stationary(3 * H, torch.float64, torch.device("cpu"))
    return {"calibrated": lambda _, mean: mean}.get(name, name if fixed is None else fixed), corrections


@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("cell", CELLS)
def test_every_rule_has_the_gradient_of_its_equations(cell, heads, rule, corrections):
    corrections = 0 if rule == "bptt" else corrections
    made = layer(cell, num_heads=heads, feedback=sf.Feedback(rule, corrections=corrections))
    state = initial_state(1, started=True)
    assert_same(of_the_layer(made, state), of_the_equations(made, state, of_the_oracle(rule, corrections)))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("bptt", "fitted")])
@pytest.mark.parametrize("cell", CELLS)
def test_as_many_corrections_as_steps_are_bptt(cell, rule):
    state = initial_state(1, started=True)
    exact = of_the_layer(layer(cell, num_heads=2), state)
    found = of_the_layer(layer(cell, num_heads=2, feedback=f"{rule}+{T}"), state)
    assert_same(found, exact, SAME_BY_CANCELLATION)
    assert_different(of_the_layer(layer(cell, num_heads=2, feedback=rule), state), exact)


@pytest.mark.parametrize("rule", ["bptt", "dsf", "gate+1"])
def test_stacked_layers_and_directions(rule):
    made = layer("slstm", num_heads=2, num_layers=2, bidirectional=True, feedback=rule)
    state = initial_state(4, started=True)
    name, _, corrections = rule.partition("+")
    assert_same(of_the_layer(made, state), of_the_equations(made, state, of_the_oracle(name, int(corrections or 0))))
