"""Tests of the oracles: they agree with autograd, and they reject planted errors."""

import oracles
import pytest
import torch
from tolerances import DIFFERENT, SAME_BY_CANCELLATION, assert_different, assert_same, error
from torch import nn

CELLS = ["tanh", "relu", "gru", "lstm", "lstm_projected"]
DIAGONALS = ["dsf", "gate", "jacobian", 0.0, -0.7, "given"]
T, B, I, H, P = 6, 2, 3, 4, 2


def widths(cell):
    """Widths of the parts of the state."""
    return {"lstm": (H, H), "lstm_projected": (P, H)}.get(cell, (H,))


def parted(cell, state):
    """A state in the form of torch's layers."""
    return tuple(p.contiguous() for p in state.split(widths(cell), -1)) if len(widths(cell)) > 1 else state


def layer(cell, **options):
    """The torch.nn layer of a cell in float64, with weights large enough that every term of J matters."""
    torch.manual_seed(0)
    kind = {"gru": nn.GRU, "lstm": nn.LSTM, "lstm_projected": nn.LSTM}.get(cell)
    options |= {"proj_size": P} if cell == "lstm_projected" else {}
    made = kind(I, H, dtype=torch.float64, **options) if kind else nn.RNN(I, H, 1, cell, dtype=torch.float64, **options)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.6)
    return made


def problem(cell):
    """Weights, inputs, an initial state, and a gradient from outside for every state (for c, at the last step only)."""
    weights = oracles.weights_of(dict(layer(cell).state_dict()), "_l0")
    torch.manual_seed(1)
    S = sum(widths(cell))
    x, initial, e = (torch.randn(*shape, dtype=torch.float64) for shape in ((T, B, I), (B, S), (T, B, S)))
    e[:-1, :, widths(cell)[0] :] = 0
    return weights, x, initial, e


def diagonal(cell, name):
    return torch.linspace(-0.9, 1.1, sum(widths(cell)), dtype=torch.float64) if name == "given" else name


def autograd(cell):
    """The gradients of the same problem as torch.nn computes them."""
    _, x, initial, e = problem(cell)
    made = layer(cell)
    x.requires_grad_()
    initial.requires_grad_()
    y, last = made(x, parted(cell, initial.unsqueeze(0)))
    loss = (y * e[..., : y.shape[-1]]).sum()
    if cell.startswith("lstm"):
        loss = loss + (last[1][0] * e[-1, :, y.shape[-1] :]).sum()
    loss.backward()
    found = {name.removesuffix("_l0"): value.grad for name, value in made.named_parameters()}
    return {**found, "x": x.grad, "initial": initial.grad}


@pytest.mark.parametrize("cell", CELLS)
def test_forward_is_torchs(cell):
    weights, x, initial, _ = problem(cell)
    states = oracles.run(cell, weights, x, initial)
    y, last = layer(cell)(x, parted(cell, initial.unsqueeze(0)))
    last = torch.cat(last, -1) if cell.startswith("lstm") else last
    assert_same({"y": states[1:, :, : widths(cell)[0]], "last": states[-1:]}, {"y": y, "last": last})


@pytest.mark.parametrize("cell", CELLS)
def test_jacobians_are_those_of_torchs_cells(cell):
    weights, x, initial, _ = problem(cell)
    states = oracles.run(cell, weights, x, initial)
    made = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}.get(cell)
    if cell == "lstm_projected":  # torch has no such cell
        one = layer(cell)
    else:
        one = made(I, H, dtype=torch.float64) if made else nn.RNNCell(I, H, nonlinearity=cell, dtype=torch.float64)
        one.load_state_dict(weights)

    def after(row, s):
        if cell == "lstm_projected":
            return torch.cat([v[0] for v in one(row[None], tuple(p[None] for p in s.split((P, H))))[1]])
        if cell == "lstm":
            return torch.cat(one(row, s.chunk(2, -1)), -1)
        return one(row, s)

    J = oracles.jacobians(cell, weights, x, states)
    for t in range(T):
        for b in range(B):
            expected = torch.autograd.functional.jacobian(lambda s, t=t, b=b: after(x[t, b], s), states[t, b])
            assert error(J[t, b], expected) < 1e-12


@pytest.mark.parametrize("cell", CELLS)
def test_exact_rule_is_autograd(cell):
    weights, x, initial, e = problem(cell)
    assert_same(oracles.layer_gradients(cell, weights, x, initial, e, None), autograd(cell))


@pytest.mark.parametrize("name", DIAGONALS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_diagonal_with_t_corrections_is_autograd_and_without_them_is_not(cell, name):
    if name == "gate" and cell in ("tanh", "relu"):
        return  # an RNN has no gate
    weights, x, initial, e = problem(cell)
    none, enough = (oracles.layer_gradients(cell, weights, x, initial, e, (diagonal(cell, name), k)) for k in (0, T))
    assert_same(enough, autograd(cell), SAME_BY_CANCELLATION)
    assert_different(none, autograd(cell))


@pytest.mark.parametrize("cell", CELLS)
def test_t_minus_one_corrections_are_exact_except_for_the_initial_state(cell):
    weights, x, initial, e = problem(cell)
    found, expected = oracles.layer_gradients(cell, weights, x, initial, e, (-0.7, T - 1)), autograd(cell)
    assert_different({"initial": found.pop("initial")}, {"initial": expected.pop("initial")})
    assert_same(found, expected, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("k", [0, 1, 3, T])
def test_truncation_by_its_own_definition_is_feedback_with_a_zero_diagonal(cell, k):
    weights, x, initial, e = problem(cell)
    expected = oracles.truncated_gradients(cell, weights, x, initial, e, k)
    assert_same(oracles.layer_gradients(cell, weights, x, initial, e, (0.0, k)), expected)
    if k == T:
        assert_same(expected, autograd(cell))
    else:
        assert_different(expected, autograd(cell))
        assert_different(oracles.truncated_gradients(cell, weights, x, initial, e, k + 1), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_diagonal_of_the_jacobian_has_the_published_formulas(cell):
    weights, x, initial, _ = problem(cell)
    states = oracles.run(cell, weights, x, initial)
    found = oracles.diagonals(cell, weights, x, states, "jacobian")
    h, after, W = states[:-1, :, : widths(cell)[0]], states[1:], weights["weight_hh"]
    if cell == "gru":
        input_part = (x @ weights["weight_ih"].T + weights["bias_ih"]).chunk(3, -1)
        hidden_part = (h @ W.T + weights["bias_hh"]).chunk(3, -1)
        r, z, q = (
            torch.sigmoid(input_part[0] + hidden_part[0]),
            torch.sigmoid(input_part[1] + hidden_part[1]),
            hidden_part[2],
        )
        n = torch.tanh(input_part[2] + r * q)
        d_r, d_z, d_n = (block.diagonal() for block in W.chunk(3))
        expected = z + (h - n) * z * (1 - z) * d_z + (1 - z) * (1 - n**2) * (r * d_n + q * r * (1 - r) * d_r)
    elif cell.startswith("lstm"):
        a = x @ weights["weight_ih"].T + weights["bias_ih"] + h @ W.T + weights["bias_hh"]
        i, f, g, o = (torch.tanh(v) if n == 2 else torch.sigmoid(v) for n, v in enumerate(a.chunk(4, -1)))
        c, c_after = states[:-1, :, -H:], after[..., -H:]
        t = torch.tanh(c_after)
        if cell == "lstm":
            d_i, d_f, d_g, d_o = (block.diagonal() for block in W.chunk(4))
            through_c = c * f * (1 - f) * d_f + g * i * (1 - i) * d_i + i * (1 - g**2) * d_g
            expected = torch.cat((t * o * (1 - o) * d_o + o * (1 - t**2) * through_c, f), -1)
        else:
            of_gates = [g * i * (1 - i), c * f * (1 - f), i * (1 - g**2)]
            of_gates = [o * (1 - t**2) * d for d in of_gates] + [t * o * (1 - o)]
            at_h = [
                sum(
                    (d * weights["weight_hr"][p] * block[:, p]).sum(-1)
                    for d, block in zip(of_gates, W.chunk(4), strict=True)
                )
                for p in range(P)
            ]
            expected = torch.cat((torch.stack(at_h, -1), f), -1)
    else:
        expected = (1 - after**2 if cell == "tanh" else (after > 0).double()) * W.diagonal()
    assert_same({"D": found}, {"D": expected})


def test_gate_is_the_direct_path():
    """Where W_hh = 0, the gate is all of the Jacobian's diagonal (in the LSTM, of its c)."""
    for cell in ("gru", "lstm", "lstm_projected"):
        weights, x, initial, _ = problem(cell)
        weights["weight_hh"] = torch.zeros_like(weights["weight_hh"])
        states = oracles.run(cell, weights, x, initial)
        expected = oracles.diagonals(cell, weights, x, states, "jacobian")
        assert_same({"D": oracles.diagonals(cell, weights, x, states, "gate")}, {"D": expected})


def test_running_mean_is_the_mean_of_a_hundred_and_then_forgets():
    torch.manual_seed(2)
    values = torch.randn(130, 3, dtype=torch.float64)
    assert_same({"mean": oracles.running_mean(values[:100])}, {"mean": values[:100].mean(0)})
    expected = values[:100].mean(0) * 0.99**30 + sum(0.01 * 0.99 ** (29 - n) * values[100 + n] for n in range(30))
    assert_same({"mean": oracles.running_mean(values)}, {"mean": expected})


# Planted errors -------------------------------------------------------------------------------------------------------


def shift_dropped(monkeypatch):
    monkeypatch.setattr(oracles, "shift", lambda back: back)


def shifted_twice(monkeypatch):
    once = oracles.shift
    monkeypatch.setattr(oracles, "shift", lambda back: once(once(back)))


def sign_turned(monkeypatch):
    right = oracles.returned
    monkeypatch.setattr(oracles, "returned", lambda M, delta: -right(M, delta))


def jacobian_transposed(monkeypatch):
    right = oracles.returned
    monkeypatch.setattr(oracles, "returned", lambda M, delta: right(M.mT, delta))


def weight_transposed(monkeypatch):
    right = oracles.jacobians

    def wrong(cell, w, x, states):
        blocks = [block.T.reshape(block.shape) for block in w["weight_hh"].split(H)]
        return right(cell, {**w, "weight_hh": torch.cat(blocks)}, x, states)

    monkeypatch.setattr(oracles, "jacobians", wrong)


def step_late(monkeypatch):
    """J[t] and D[t] of the transition into t used for the transition out of it."""
    right_j, right_f = oracles.jacobians, oracles.feedbacks
    monkeypatch.setattr(oracles, "jacobians", lambda *given: right_j(*given).roll(1, 0))
    monkeypatch.setattr(oracles, "feedbacks", lambda *given: right_f(*given).roll(1, 0))


def halves_swapped(monkeypatch):
    """The h of the state taken for its c (in the LSTM), or the units in reverse (elsewhere)."""
    right = oracles.diagonals
    monkeypatch.setattr(oracles, "diagonals", lambda *given: right(*given).roll(right(*given).shape[-1] // 2, -1))


def projection_forgotten(monkeypatch):
    """Only the first units of o tanh(c) taken for the projected h, in J alone."""
    right = oracles.jacobians

    def wrong(cell, w, x, states):
        return right(cell, {**w, "weight_hr": torch.eye(*w["weight_hr"].shape, dtype=x.dtype)}, x, states)

    monkeypatch.setattr(oracles, "jacobians", wrong)


def gradient_at_c_fed_to_h(monkeypatch):
    """Only the gradient from outside is fed back on c, not the whole gradient at c."""
    monkeypatch.setattr(oracles, "feedbacks", lambda cell, w, x, states, D: torch.diag_embed(D))


PLANTS = [
    shift_dropped,
    shifted_twice,
    sign_turned,
    jacobian_transposed,
    weight_transposed,
    step_late,
    halves_swapped,
    gradient_at_c_fed_to_h,
    projection_forgotten,
]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_feedback_oracle_rejects_planted_errors(cell, plant, monkeypatch):
    if plant is gradient_at_c_fed_to_h and not cell.startswith("lstm"):
        return  # only the LSTM has a c
    if plant is projection_forgotten and cell != "lstm_projected":
        return
    weights, x, initial, e = problem(cell)
    rule = ("jacobian" if plant is step_late else "dsf", 1)
    right = oracles.layer_gradients(cell, weights, x, initial, e, rule)
    plant(monkeypatch)
    assert_different(oracles.layer_gradients(cell, weights, x, initial, e, rule), right)


@pytest.mark.parametrize("plant", PLANTS[:6])
@pytest.mark.parametrize("cell", CELLS)
def test_autograd_rejects_planted_errors(cell, plant, monkeypatch):
    """The comparison with autograd at k = T, which the package too must pass, sees the same errors."""
    weights, x, initial, e = problem(cell)
    plant(monkeypatch)
    assert_different(oracles.layer_gradients(cell, weights, x, initial, e, ("jacobian", T)), autograd(cell))


@pytest.mark.parametrize("cell", CELLS)
def test_truncation_oracle_rejects_one_step_too_many_or_too_few(cell):
    weights, x, initial, e = problem(cell)
    for k in (1, 2, 3):
        found = oracles.layer_gradients(cell, weights, x, initial, e, (0.0, k))
        for wrong in (k - 1, k + 1):
            assert_different(oracles.truncated_gradients(cell, weights, x, initial, e, wrong), found)


def test_calibration_oracle_rejects_wrong_weights():
    torch.manual_seed(2)
    values = torch.randn(130, 3, dtype=torch.float64)
    assert_different({"mean": values.mean(0)}, {"mean": oracles.running_mean(values)})
    few = values[:5]
    started_from_zero = oracles.running_mean(torch.cat((torch.zeros(1, 3), few)))
    assert_different({"mean": started_from_zero}, {"mean": oracles.running_mean(few)})


# Networks and scans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_network_oracle_is_autograd_on_packed_sequences(cell, bidirectional):
    made = layer(cell, bidirectional=bidirectional, **{} if cell in ("tanh", "relu") else {"num_layers": 2})
    places = (1 if cell in ("tanh", "relu") else 2) * (1 + bidirectional)
    sequences = [torch.randn(n, I, dtype=torch.float64, requires_grad=True) for n in (2, 4, 1)]
    initial = torch.randn(places, 3, sum(widths(cell)), dtype=torch.float64, requires_grad=True)
    final_gradients = torch.randn_like(initial).detach()
    output_gradients = [
        torch.randn(len(x), widths(cell)[0] * (1 + bidirectional), dtype=torch.float64) for x in sequences
    ]

    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    y, last = made(packed, parted(cell, initial))
    y, last = nn.utils.rnn.unpack_sequence(y), torch.cat(last, -1) if cell.startswith("lstm") else last
    loss = sum((a * b).sum() for a, b in zip(y, output_gradients, strict=True)) + (last * final_gradients).sum()
    loss.backward()

    def found(rule):
        plain = [x.detach() for x in sequences]
        args = (initial.detach(), output_gradients, final_gradients, rule)
        return oracles.network(cell, dict(made.state_dict()), plain, *args)

    expected = {name: p.grad for name, p in made.named_parameters()} | {"initial": initial.grad}
    exact = found(None)
    assert_same(exact.gradients, expected)
    assert_same(found(("jacobian", 4)).gradients, expected, SAME_BY_CANCELLATION)
    assert_different(found(("dsf", 0)).gradients, expected)
    assert_same(dict(zip("abc", exact.outputs, strict=True)), dict(zip("abc", y, strict=True)))
    assert_same(dict(zip("abc", exact.inputs, strict=True)), {n: x.grad for n, x in zip("abc", sequences, strict=True)})
    assert_same({"last": exact.final}, {"last": last})


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_oracle_solves_its_equation_and_rejects_planted_errors(reverse):
    x, a, initial = torch.randn(5, 2), torch.rand(5, 2) + 0.5, torch.randn(2)
    x, a, initial = (v.double() for v in (x, a, initial))
    found = oracles.scan(x, a, reverse, initial)
    matrix = torch.eye(5, dtype=torch.float64)[None] - torch.stack([torch.diag(col[1:], -1) for col in a.T])
    if reverse:
        matrix = torch.eye(5, dtype=torch.float64)[None] - torch.stack([torch.diag(col[:-1], 1) for col in a.T])
    right = x.clone()
    right[-1 if reverse else 0] += a[-1 if reverse else 0] * initial
    expected = torch.linalg.solve(matrix, right.T[..., None])[..., 0].T
    assert_same({"y": found}, {"y": expected})
    for wrong in (
        oracles.scan(x, -a, reverse, initial),
        oracles.scan(x, a.roll(1, 0), reverse, initial),
        oracles.scan(x, a, not reverse, initial),
        oracles.scan(x, a, reverse),
    ):
        assert error(wrong, expected) > DIFFERENT
