"""Gradients of one layer in one direction under every rule, against the oracles and exact BPTT."""

import oracles
import pytest
import torch
from tolerances import SAME_BY_CANCELLATION, assert_as_accurate, assert_different, assert_same, error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import statefeed as sf

# The tests use the cases of two warnings: initial states without corrections, corrections around a ramp to one.
pytestmark = pytest.mark.filterwarnings("ignore:the initial state", "ignore:feedback .* adds corrections")

CELLS = ["tanh", "relu", "gru", "lstm", "lstm_projected"]
DIAGONALS = ["ft-bptt", "dsf", "given", -0.7, "calibrated", "gate", "jacobian"]
PAIRS = [(cell, name) for cell in CELLS for name in DIAGONALS if name != "gate" or cell not in ("tanh", "relu")]
B, I, H = 2, 3, 4


def widths(cell, width=H):
    """Widths of the parts of the state."""
    return {"lstm": (width, width), "lstm_projected": (max(width // 2, 1), width)}.get(cell, (width,))


def layer(cell, feedback, width=H, torchs=False, dtype=torch.float64, **options):
    """A layer of ours or torch's, with the same weights for both, large enough that every term of J matters."""
    torch.manual_seed(0)
    package = nn if torchs else sf
    cls = {"gru": package.GRU, "lstm": package.LSTM, "lstm_projected": package.LSTM}.get(cell, package.RNN)
    options |= {"proj_size": widths(cell, width)[0]} if cell == "lstm_projected" else {}
    options |= {"nonlinearity": cell} if cls is package.RNN else {}
    options |= {} if torchs else {"feedback": feedback}
    made = cls(I, width, dtype=torch.float64, **options)
    for weight in made.parameters():
        nn.init.normal_(weight, std=1.2 / (width + I + 1) ** 0.5)
    return made.to(dtype)


def problem(cell, T, width=H, batch=B):
    """Inputs, an initial state, and a gradient for every state from outside (for c, at the last step only)."""
    torch.manual_seed(T)
    S = sum(widths(cell, width))
    x, initial, e = (torch.randn(*shape, dtype=torch.float64) for shape in ((T, batch, I), (batch, S), (T, batch, S)))
    e[:-1, :, widths(cell, width)[0] :] = 0
    return x, initial, e


def given(S):
    return torch.linspace(-0.9, 1.0, S, dtype=torch.float64)


def feedback(cell, name, corrections=0, width=H):
    diagonal = given(sum(widths(cell, width))) if name == "given" else name
    return sf.Feedback(diagonal, corrections=corrections)


def oracle_diagonal(cell, w, x, initial, name):
    """The diagonal that the equations give for a name, as the oracle takes it."""
    if name == "calibrated":  # after its first update
        states = oracles.run(cell, w, x, initial)
        return oracles.diagonals(cell, w, x, states, "jacobian").mean((0, 1))
    return {"ft-bptt": 0.0, "given": given(initial.shape[-1])}.get(name, name)


def weights(made):
    return oracles.weights_of(dict(made.state_dict()), "_l0")


def joined(state):
    return torch.cat(state, -1) if isinstance(state, tuple) else state


def parted(cell, state):
    if not cell.startswith("lstm"):
        return state
    S = state.shape[-1]
    width = next(width for width in range(1, S) if sum(widths(cell, width)) == S)
    return tuple(part.contiguous() for part in state.split(widths(cell, width), -1))


def losses(y, last, e):
    """The loss whose gradient at every state is e: on y, and for the LSTM on c_n."""
    width = y.shape[-1]
    return (y * e[..., :width]).sum() + (last[0, :, width:] * e[-1, :, width:]).sum()


def gradients(cell, made, x, initial, e, split=None):
    """Gradients of all weights, of "x" and of "initial", in one call, or in two calls that pass the state."""
    x, initial = x.detach().clone().requires_grad_(), initial.detach().clone().requires_grad_()
    y, last = made(x[:split], parted(cell, initial.unsqueeze(0)))
    if split is not None:
        rest, last = made(x[split:], last)
        y = torch.cat((y, rest))
    made.zero_grad()
    losses(y, joined(last), e.to(y.dtype)).backward()
    named = {name.removesuffix("_l0"): value.grad.clone() for name, value in made.named_parameters()}
    return {**named, "x": x.grad, "initial": initial.grad}


def bptt(cell, x, initial, e, **options):
    return gradients(cell, layer(cell, None, torchs=True, **options), x, initial, e)


# Every rule follows its equations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrections", [0, 1, 2])
@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_every_rule_has_the_gradient_of_its_equations(cell, name, corrections):
    for T in (1, 2, 6):
        made = layer(cell, feedback(cell, name, corrections))
        x, initial, e = problem(cell, T)
        w = weights(made)
        rule = (oracle_diagonal(cell, w, x, initial, name), corrections)
        expected = oracles.layer_gradients(cell, w, x, initial, e, rule)
        assert_same(gradients(cell, made, x, initial, e), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_sizes_of_one_and_odd_sizes(cell):
    least = 2 if cell == "lstm_projected" else 1  # a projection is to fewer units
    for T, batch, width in ((1, 1, least), (3, 1, 2), (17, 3, least), (2, 17, 3), (3, 2, 17)):
        for name in ("dsf", "jacobian"):
            made = layer(cell, feedback(cell, name, 1, width), width)
            x, initial, e = problem(cell, T, width, batch)
            expected = oracles.layer_gradients(cell, weights(made), x, initial, e, (name, 1))
            assert_same(gradients(cell, made, x, initial, e), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_without_biases(cell):
    made = layer(cell, "dsf", bias=False)
    x, initial, e = problem(cell, 5)
    expected = oracles.layer_gradients(cell, weights(made), x, initial, e, ("dsf", 0))
    assert set(expected) - {"weight_hr"} == {"weight_ih", "weight_hh", "x", "initial"}
    assert_same(gradients(cell, made, x, initial, e), expected)


@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_float32_is_as_accurate_as_the_equations_in_float32(cell, name):
    width = 9
    made = layer(cell, feedback(cell, name, 1, width), width, dtype=torch.float32)
    given_32 = [v.float() for v in problem(cell, 7, width, 3)]
    answers = [gradients(cell, made, *given_32)]
    for dtype in (torch.float32, torch.float64):
        w = {key: value.to(dtype) for key, value in weights(made).items()}
        x, initial, e = (v.to(dtype) for v in given_32)
        rule = (oracle_diagonal(cell, w, x, initial, name), 1)
        answers.append(oracles.layer_gradients(cell, w, x, initial, e, rule))
    assert_as_accurate(*answers)


# Where it must be exact -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_one_step_is_exact_for_weights_and_inputs(cell, name):
    x, initial, e = problem(cell, 1)
    found, expected = gradients(cell, layer(cell, feedback(cell, name)), x, initial, e), bptt(cell, x, initial, e)
    if name != "jacobian":
        assert_different({"initial": found["initial"]}, {"initial": expected["initial"]})
    del found["initial"], expected["initial"]
    assert_same(found, expected)


@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_as_many_corrections_as_steps_are_exact_for_every_diagonal(cell, name):
    for T in (1, 2, 6):
        x, initial, e = problem(cell, T)
        expected = bptt(cell, x, initial, e)
        for corrections in (T, T + 2):
            found = gradients(cell, layer(cell, feedback(cell, name, corrections)), x, initial, e)
            assert_same(found, expected, SAME_BY_CANCELLATION)


def special(cell, made):
    """Set the weights so that the state Jacobian is a constant diagonal, and return it."""
    made = made.requires_grad_(False)
    D = torch.linspace(0.1, 0.9, H, dtype=torch.float64)
    if cell == "relu":
        for weight in made.parameters():
            weight.abs_()
        made.weight_hh_l0.copy_(torch.diag(D))
    else:
        gate = slice(H, 2 * H)  # z of the GRU, f of the LSTM
        made.weight_hh_l0.zero_()
        made.weight_ih_l0[gate] = 0
        made.bias_ih_l0[gate] = D.logit()
        made.bias_hh_l0[gate] = 0
    made.requires_grad_(True)
    return torch.cat((torch.zeros(widths(cell)[0], dtype=torch.float64), D)) if cell.startswith("lstm") else D


@pytest.mark.parametrize("cell", ["relu", "gru", "lstm", "lstm_projected"])
def test_a_diagonal_that_is_the_jacobian_is_exact(cell):
    """relu RNN, W_hh = diag(D) and pre-activations positive; GRU, W_hh = 0 and z = D; LSTM, W_hh = 0 and f = D."""
    x, initial, e = problem(cell, 7)
    if cell == "relu":
        x, initial = x.abs(), initial.abs()
    theirs, ours = layer(cell, None, torchs=True), layer(cell, "ft-bptt")
    special(cell, theirs)
    ours.feedback = special(cell, ours)
    expected = gradients(cell, theirs, x, initial, e)
    assert_same(gradients(cell, ours, x, initial, e), expected)
    for rule in ("jacobian", "calibrated", *(["gate"] if cell != "relu" else [])):
        ours.feedback = rule
        assert_same(gradients(cell, ours, x, initial, e), expected)
    ours = layer(cell, "fitted")
    D = special(cell, ours)
    for _ in range(2):  # once exact, once under the fit
        assert_same(gradients(cell, ours, x, initial, e), expected)
        assert_same({"diagonal": ours.diagonal[0]}, {"diagonal": D})
    ours.feedback = "dsf"
    assert_different(gradients(cell, ours, x, initial, e), expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("corrections", [0, 1, 2, 4, 6, 9])
def test_full_truncation_with_corrections_is_truncated_bptt(cell, corrections):
    x, initial, e = problem(cell, 6)
    made = layer(cell, f"ft-bptt+{corrections}")
    expected = oracles.truncated_gradients(cell, weights(made), x, initial, e, corrections)
    assert_same(gradients(cell, made, x, initial, e), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_bptt_is_torchs(cell):
    x, initial, e = problem(cell, 6)
    assert_same(gradients(cell, layer(cell, "torch"), x, initial, e), bptt(cell, x, initial, e))


# Where it must differ -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrections", [0, 1, 3])
@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_too_few_corrections_are_not_exact(cell, name, corrections):
    """There is no silent fallback to autograd, for weights and inputs."""
    x, initial, e = problem(cell, 6)
    found = gradients(cell, layer(cell, feedback(cell, name, corrections)), x, initial, e)
    expected = bptt(cell, x, initial, e)
    for key in ("weight_ih", "weight_hh", "x"):
        assert error(found[key], expected[key]) > 1e-5
    if not corrections:
        assert_different(found, expected)


# Splitting a sequence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrections", [0, 6])
@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_splitting_a_sequence_gives_the_same_gradient_without_corrections_or_with_enough(cell, name, corrections):
    x, initial, e = problem(cell, 6)
    made = layer(cell, feedback(cell, name, corrections))
    if name == "calibrated":
        gradients(cell, made, x, initial, e)
        made.eval()
    whole = gradients(cell, made, x, initial, e)
    for split in (1, 3, 5):
        assert_same(gradients(cell, made, x, initial, e, split), whole, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("cell", CELLS)
def test_splitting_a_sequence_with_few_corrections_changes_the_gradient(cell):
    x, initial, e = problem(cell, 6)
    made = layer(cell, feedback(cell, -0.7, 2))
    assert_different(gradients(cell, made, x, initial, e, 3), gradients(cell, made, x, initial, e))


# Calibration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_calibrated_diagonal_is_the_running_mean(cell):
    made = layer(cell, "calibrated")
    S = sum(widths(cell))
    assert made.diagonal.shape == (1, S)
    assert not made.diagonal.any()
    w, means = weights(made), []
    for n in range(1, 104):
        x, initial, e = problem(cell, 1 + n % 2)
        x, initial = x + n / 50, initial * (n % 5)  # the mean drifts
        states = oracles.run(cell, w, x, initial)
        means.append(oracles.diagonals(cell, w, x, states, "jacobian").mean((0, 1)))
        found = gradients(cell, made, x, initial, e)
        expected_diagonal = oracles.running_mean(means)
        assert_same({"diagonal": made.diagonal[0]}, {"diagonal": expected_diagonal})
        if n in (2, 103):  # updated before the scan uses it
            rule = (expected_diagonal, 0)
            assert_same(found, oracles.layer_gradients(cell, w, x, initial, e, rule))


@pytest.mark.parametrize("cell", CELLS)
def test_calibrated_diagonal_moves_in_a_training_backward_only(cell):
    made = layer(cell, "calibrated")
    x, initial, e = problem(cell, 5)
    hx = parted(cell, initial.unsqueeze(0))
    zero = oracles.layer_gradients(cell, weights(made), x, initial, e, (0.0, 0))
    made.eval()
    assert_same(gradients(cell, made, x, initial, e), zero)  # before its first update it is zero
    made.train()
    made(x, hx)  # a forward pass alone
    with torch.no_grad():
        made(x, hx)
    assert not made.diagonal.any()
    gradients(cell, made, x, initial, e)
    first = made.diagonal.clone()
    assert first.any()
    made.eval()
    gradients(cell, made, x * 2, initial, e)
    made.feedback = "dsf"
    made.train()
    gradients(cell, made, x * 2, initial, e)
    assert torch.equal(made.diagonal, first)
    made.feedback = "calibrated+1"
    gradients(cell, made, x * 2, initial, e)  # one update whatever the number of corrections
    states = oracles.run(cell, weights(made), x * 2, initial)
    second = oracles.diagonals(cell, weights(made), x * 2, states, "jacobian").mean((0, 1))
    assert_same({"diagonal": made.diagonal[0]}, {"diagonal": oracles.running_mean([first[0], second])})


# The least-squares fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_fitted_diagonal_is_the_least_squares_fit_to_an_exact_pass(cell):
    for T in (1, 2, 6):
        made = layer(cell, "fitted")
        x, initial, e = problem(cell, T)
        w = weights(made)
        diagonal = oracles.fitted(cell, w, x, initial, e)
        assert_same(gradients(cell, made, x, initial, e), bptt(cell, x, initial, e))
        assert_same({"diagonal": made.diagonal[0]}, {"diagonal": diagonal})
        other = problem(cell, T + 1)
        expected = oracles.layer_gradients(cell, w, *other, (diagonal, 0))
        assert_same(gradients(cell, made, *other), expected)
        assert_same({"diagonal": made.diagonal[0]}, {"diagonal": diagonal})


@pytest.mark.parametrize("cell", CELLS)
def test_the_fitted_diagonal_minimizes_the_squared_error(cell):
    """Independent of the formula: the error of every unit increases in both directions."""
    made = layer(cell, "fitted")
    x, initial, e = problem(cell, 6)
    gradients(cell, made, x, initial, e)
    w = weights(made)
    states = oracles.run(cell, w, x, initial)
    J = oracles.jacobians(cell, w, x, states)
    delta, _ = oracles.adjoint(e, J, J, 0)

    def squared_error(a):
        F = oracles.feedbacks(cell, w, x, states, a.expand(states[1:].shape))
        return oracles.returned(J - F, delta).square().sum((0, 1))

    fitted = made.diagonal[0]
    assert (squared_error(fitted) < squared_error(fitted + 1e-3)).all()
    assert (squared_error(fitted) < squared_error(fitted - 1e-3)).all()


def test_every_fiftieth_training_backward_is_exact_and_fits_again():
    made = layer("gru", "fitted+1")
    x, initial, e = problem("gru", 3)
    exact = bptt("gru", x, initial, e)
    fits = []
    for n in range(101):
        gradients("gru", made, x, initial, e if n % 50 else e * (n + 1) ** torch.rand_like(e))
        fits.append(made.diagonal.clone())
    assert torch.equal(fits[0], fits[49])
    assert torch.equal(fits[50], fits[99])
    assert not torch.equal(fits[49], fits[50])
    assert not torch.equal(fits[99], fits[100])
    expected = oracles.layer_gradients("gru", weights(made), x, initial, e, (fits[100][0], 1))
    assert_same(gradients("gru", made, x, initial, e), expected)
    assert_different(expected, exact)


def test_only_training_fits_and_units_without_gradient_stay_zero():
    made = layer("gru", "fitted").eval()
    x, initial, e = problem("gru", 4)
    zero = oracles.layer_gradients("gru", weights(made), x, initial, e, (0.0, 0))
    assert_same(gradients("gru", made, x, initial, e), zero)
    assert not made.diagonal.any()
    made.train()
    e[..., 0] = 0
    with torch.no_grad():
        made.weight_hh_l0[:, 0] = 0
    gradients("gru", made, x, initial, e)
    assert made.diagonal[0, 0] == 0
    assert made.diagonal[0, 1:].all()


# Autograd -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dsf", "jacobian+1"])
@pytest.mark.parametrize("cell", CELLS)
def test_each_argument_may_be_the_only_one_that_requires_grad(cell, rule):
    x, initial, e = problem(cell, 5)
    whole = gradients(cell, layer(cell, rule), x, initial, e)
    for alone in whole:
        made = layer(cell, rule).requires_grad_(False)
        leaves = {**{name.removesuffix("_l0"): p for name, p in made.named_parameters()}, "x": x.clone()}
        leaves["initial"] = initial.clone()
        leaves[alone].requires_grad_()
        y, last = made(leaves["x"], parted(cell, leaves["initial"].unsqueeze(0)))
        found = torch.autograd.grad(losses(y, joined(last), e), leaves[alone])
        assert_same({alone: found[0]}, {alone: whole[alone]})


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_of_a_frozen_layer_need_no_gradient(cell):
    made = layer(cell, "dsf").requires_grad_(False)
    y, last = made(problem(cell, 5)[0])
    assert not y.requires_grad
    assert not joined(last).requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_the_loss_may_use_one_output_only(cell):
    x, initial, _ = problem(cell, 5)
    S, P = initial.shape[-1], widths(cell)[0]
    for places in ((slice(None), slice(P)), (slice(-1, None), slice(P)), (slice(-1, None), slice(P, S))):
        e = torch.zeros(5, B, S, dtype=torch.float64)
        e[places[0], :, places[1]] = 1.5
        if not e.any():
            continue  # no c
        made = layer(cell, "dsf+1")
        y, last = made(x, parted(cell, initial.unsqueeze(0)))
        last = last if isinstance(last, tuple) else (last,)
        used = y if places[0] == slice(None) else last[0] if places[1] == slice(P) else last[1]
        (1.5 * used).sum().backward()
        expected = oracles.layer_gradients(cell, weights(made), x, initial, e, ("dsf", 1))
        found = {name.removesuffix("_l0"): p.grad for name, p in made.named_parameters()}
        assert_same(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("cell", CELLS)
def test_a_retained_graph_gives_the_same_gradient_twice(cell):
    x, initial, e = problem(cell, 5)
    made = layer(cell, "jacobian+1")
    y, last = made(x, parted(cell, initial.unsqueeze(0)))
    loss = losses(y, joined(last), e)
    first = torch.autograd.grad(loss, made.weight_hh_l0, retain_graph=True)
    assert_same({"weight": torch.autograd.grad(loss, made.weight_hh_l0)[0]}, {"weight": first[0]})


@pytest.mark.parametrize("change", [nn.ReLU(inplace=True), nn.Dropout(inplace=True), lambda y: y.mul_(2)])
@pytest.mark.parametrize("feedback", ["bptt", "dsf"])
@pytest.mark.parametrize("make", [sf.RNN, sf.GRU, sf.LSTM, lambda *a, **k: sf.Recurrent(nn.GRUCell(*a), **k)])
def test_an_output_changed_before_the_backward_pass_says_what_to_do(make, feedback, change):
    made = make(3, 5, feedback=feedback)
    y, _ = made(torch.randn(150, 6, 3))  # long enough for the kernels
    loss = change(y).sum()
    if isinstance(made, sf.Recurrent) and feedback == "bptt":  # plain autograd
        loss.backward()
        return
    with pytest.raises(RuntimeError, match=r"was changed in place before the backward pass.*: compute a new tensor"):
        loss.backward()


@pytest.mark.parametrize("cell", CELLS)
def test_a_weight_changed_between_forward_and_backward_is_an_error_as_in_torch(cell):
    x, _, _ = problem(cell, 5)
    for made in (layer(cell, None, torchs=True), layer(cell, "jacobian+1")):
        y, _ = made(x)
        with torch.no_grad():
            made.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_a_second_derivative_raises(cell):
    made = layer(cell, "dsf")
    x = problem(cell, 4)[0].requires_grad_()
    y, _ = made(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for wanted in (x, made.weight_hh_l0):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(first.square().sum(), wanted, retain_graph=True)


def test_an_initial_state_that_needs_a_gradient_without_corrections_warns():
    x, initial, _ = problem("gru", 4)
    initial = initial.unsqueeze(0).requires_grad_()
    for rule, warned in (("dsf", True), ("gate", True), ("gate+1", False), ("torch", False)):
        made = layer("gru", rule)
        if warned:
            with pytest.warns(UserWarning, match="initial state"):
                made(x, initial)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("unexpected warning"))
                made(x, initial)


# Cost -----------------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations that reach torch's dispatcher."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_backward_has_no_python_loop_over_time(cell, name, corrections):
    """Operations grow with log T at most, which from 16 to 256 is a factor of two."""
    counts = []
    for T in (16, 256):
        made = layer(cell, feedback(cell, name, corrections))
        y, _ = made(problem(cell, T)[0].requires_grad_())
        with Operations() as seen:
            y.sum().backward()
        counts.append(seen.count)
    assert counts[1] <= 2 * counts[0]
