"""SLSTM: gradients of every rule, the first step, the form of the xlstm package, and operations on layers."""

import contextlib
import copy
import inspect
import itertools
import math
import pickle

import oracles
import pytest
import tables
import torch
from tolerances import DIFFERENT, SAME_BY_CANCELLATION, assert_different, assert_same, largest_error
from torch import nn

import statefeed as sf
from statefeed.feedback import TimeVarying

pytestmark = pytest.mark.filterwarnings("ignore:the initial state", "ignore:feedback .* adds corrections")

T, B, I, H = 6, 3, 3, 4
CELLS = {"slstm": "sigmoid", "slstm_exp": "exponential"}
RULES = ["bptt", "ft-bptt", "dsf", "log_spaced(9)", "0.5", "calibrated", "fitted", "gate", "jacobian"]


@pytest.fixture(autouse=True, params=["first", "reference"])
def backend(request):
    """The first backend that supports the layer, or the reference."""
    with tables.only("reference") if request.param == "reference" else contextlib.nullcontext():
        yield


reference_only = pytest.mark.parametrize("backend", ["reference"], indirect=True)
"""For the gradients of rules, in which the kernels are compared with the reference elsewhere."""


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


@reference_only
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


# The oracle -----------------------------------------------------------------------------------------------------------


def plain_autograd(cell, made, state, detach):
    """The oracle's forward loop under plain autograd with a loss on h alone; m is detached or differentiated."""
    weights = oracles.weights_of(dict(made.state_dict()), "_l0")
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    x, initial = random(T, B, I, seed=2).requires_grad_(), torch.cat(list(state[:, 0]), -1).requires_grad_()
    c_and_n = initial[:, : 3 * H]
    stabilizer = initial[:, 3 * H :]
    with pytest.MonkeyPatch.context() as patch:
        if not detach:
            patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
        states = oracles.run(cell, leaves, x, torch.cat([c_and_n, stabilizer], -1))
    grads = torch.autograd.grad((states[1:, ..., :H] * random(T, B, H, seed=3)).sum(), [*leaves.values(), x, initial])
    return dict(zip([*leaves, "x", "initial"], (*grads[:-1], grads[-1][:, : 3 * H]), strict=True))


def on_h(made, state):
    """The gradients of the layer for a loss on h alone, in the form of ``plain_autograd``."""
    x, hx = random(T, B, I, seed=2).requires_grad_(), [s.clone().requires_grad_() for s in state]
    made.zero_grad()
    (made(x, tuple(hx))[0] * random(T, B, H, seed=3)).sum().backward()
    found = {name.removesuffix("_l0"): p.grad for name, p in made.named_parameters()}
    return {**found, "x": x.grad, "initial": torch.cat([s.grad[0] for s in hx[:3]], -1)}


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_the_stabilizer_is_a_constant_for_losses_on_h(cell, detach):
    made, state = layer(cell, num_heads=2), initial_state(1, started=True)
    assert_same(on_h(made, state), plain_autograd(cell, made, state, detach))


PLANTED = {
    "no stabilizer in f": ("m_before - m)", "m_before * 0 - m)"),
    "heads in reverse order": (
        "u // width * width, u // width * width + width",
        "H - width - u // width * width, H - u // width * width",
    ),
    "sigmoid of the input gate": ("torch.exp(pre_i - m), f", "torch.sigmoid(pre_i), f"),
    "first step of the whole batch": ("n == 0", "(n == 0).all()"),
    "another order of the gates": ("pre_i, pre_f, pre_z, pre_o = (", "pre_i, pre_z, pre_f, pre_o = ("),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_found(planted, monkeypatch):
    """The oracle with an error differs from the layer, and from itself without."""
    source = inspect.getsource(oracles.slstm_gates)
    right, wrong = PLANTED[planted]
    assert source.count(right) == 1
    namespace = vars(oracles).copy()
    exec(source.replace(right, wrong), namespace)
    made, state = layer("slstm", num_heads=2), initial_state(1, started=True)
    state[1:3, 0, 1, :2] = 0  # two units of the second row start
    state[3] += 2
    monkeypatch.setattr(oracles, "slstm_gates", namespace["slstm_gates"])
    worst, _ = largest_error(of_the_layer(made, state), of_the_equations(made, state, None))
    assert worst > DIFFERENT


# The first step, and the state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_the_first_step_is_found_unit_by_unit(cell):
    """Units with n = 0 start, whatever m says; the others of the row and of the batch continue."""
    made, state = layer(cell, num_heads=2), initial_state(1, started=True)
    state[1:3, 0, 1, :2] = 0  # two units of the second row
    state[3, 0, 1, :2] = 50.0
    found = of_the_layer(made, state)
    assert_same(found, of_the_equations(made, state, None))
    state[3, 0, 1, :2] = -50.0
    assert_same({"y": of_the_layer(made, state)["y"]}, {"y": found["y"]})


@pytest.mark.parametrize("rule", ["bptt", "dsf", "gate+1", "jacobian"])
@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_sequences_of_different_lengths(form, rule):
    made = layer("slstm", num_heads=2, num_layers=2, bidirectional=True, feedback=rule)
    lengths, x = [4, 6, 1], random(T, B, I, seed=2)
    if form == "lengths":
        y, final = made(x, lengths=torch.tensor(lengths))
    else:
        packed, final = made(nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
        y, _ = nn.utils.rnn.pad_packed_sequence(packed, total_length=T)
    (y.square().sum() + sum(s.square().sum() for s in final[:3])).backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    for b, length in enumerate(lengths):
        alone, state = made(x[:length, b])
        assert_same(
            {"y": y[:length, b], "final": torch.stack(final)[:, :, b]}, {"y": alone, "final": torch.stack(state)}
        )
        (alone.square().sum() + sum(s.square().sum() for s in state[:3])).backward()
    assert_same(found, {name: p.grad for name, p in made.named_parameters()})


@pytest.mark.parametrize("rule", ["bptt", "dsf", "gate+1"])
def test_a_reset_starts_a_new_sequence(rule):
    """Other rows of the step continue: the first step is one of a row, not of the batch."""
    made, x = layer("slstm", num_heads=2, feedback=rule), random(T, B, I, seed=2)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2, 0] = resets[4, 1] = True
    y, final = made(x, resets=resets)
    (y.square().sum() + final[1].square().sum()).backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    total = 0.0
    for b, starts in enumerate([(0, 2, T), (0, 4, T), (0, T)]):
        parts = [made(x[start:stop, b]) for start, stop in itertools.pairwise(starts)]
        assert_same({"y": y[:, b]}, {"y": torch.cat([part for part, _ in parts])})
        total = total + sum(part.square().sum() for part, _ in parts) + parts[-1][1][1].square().sum()
    total.backward()
    assert_same(found, {name: p.grad for name, p in made.named_parameters()})


@pytest.mark.parametrize("rule", ["bptt", "gate", "dsf"])
def test_passing_the_final_state_on_gives_the_gradient_of_the_whole_sequence(rule):
    made, x = layer("slstm", num_heads=2, feedback=rule), random(T, B, I, seed=2)
    gradients = []
    for split in (T, 2):
        made.zero_grad()
        first, state = made(x[:split])
        rest = [made(x[split:], state)[0]] if split < T else []
        torch.cat([first, *rest]).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in made.named_parameters()})
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("form", ["dense", "lengths"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_a_forward_pass_in_parallel_over_time(cell, heads, form):
    """States and gradients are those of the sequential pass; some units start, others continue."""
    state, found = initial_state(2, started=True), []
    state[1:3, :, 1, :2] = 0
    state[3, :, 1, :2] = 3.0
    lengths = {} if form == "dense" else {"lengths": torch.tensor([T, 2, T - 1])}
    for method in ("sequential", sf.Newton(1e-13)):
        made = layer(cell, num_heads=heads, bidirectional=True, feedback="gate+1")
        made.forward_method = method
        y, final = made(random(T, B, I, seed=2), tuple(state), **lengths)
        (y.square().sum() + sum(s.square().sum() for s in final[:3])).backward()
        found.append(
            {"y": y, "final": torch.stack(final)} | {name: weight.grad for name, weight in made.named_parameters()}
        )
    assert made.newton_sequential_steps == (0, 0)
    assert_same(found[1], found[0], SAME_BY_CANCELLATION)


def test_a_parallel_pass_over_many_steps_does_not_lose_digits():
    """m over 20,000 steps as a scan: forget gates far below 1, none of which may be rounded away."""
    x = torch.randn(20_000, 1, I, generator=torch.Generator().manual_seed(0))
    outputs = []
    for method in ("sequential", "newton(1e-6)"):
        made = layer("slstm", dtype=torch.float32)
        nn.init.zeros_(made.weight_hh_l0)  # one iteration solves it
        made.forward_method = method
        with torch.no_grad():
            outputs.append(made(x)[0])
    assert_same({"y": outputs[1]}, {"y": outputs[0]}, 1e-5)


def test_a_rule_that_reads_the_linearized_cell():
    """Rows of D from outside the package, which "jacobian" has in the backends."""

    class Rows(TimeVarying):
        def rows(self, at):
            return at.cell.jacobian_diagonal(at.at, at.w_hh)

        def __str__(self):
            return "rows"

    state = initial_state(1, started=True)
    found, expected = (of_the_layer(layer("slstm", num_heads=2, feedback=r), state) for r in (Rows(), "jacobian"))
    assert_same(found, expected)


def test_the_final_stabilizer_has_no_gradient_and_the_initial_one_a_zero():
    made, hx = layer("slstm"), [s.requires_grad_() for s in initial_state(1, started=True)]
    y, final = made(random(T, B, I, seed=2), tuple(hx))
    assert [s.requires_grad for s in final] == [True, True, True, False]
    y.sum().backward()
    assert not hx[3].grad.any()
    assert all(s.grad.any() for s in hx[:3])


def test_a_fixed_diagonal_follows_the_stabilizer_and_gate_does_not():
    """(c, n, m) and (c / a, n / a, m + log a) are the same state."""
    state = initial_state(1, started=True)
    state[2] += 0.5
    state[1:3, :, 0] = 1.0
    other = state.clone()
    other[1:3] *= 0.01
    other[3] -= math.log(0.01)
    same = {}
    for rule in ("bptt", "gate", "gate+1", "dsf", "0.5"):
        a, b = (on_h(layer("slstm", feedback=rule), s) for s in (state, other))
        same[rule] = largest_error({"w": a["weight_ih"]}, {"w": b["weight_ih"]})[0]
    assert max(same["bptt"], same["gate"], same["gate+1"]) < 1e-10
    assert min(same["dsf"], same["0.5"]) > DIFFERENT


def test_large_preactivations_do_not_overflow():
    made = layer("slstm_exp", num_heads=2, feedback="gate+1", dtype=torch.float32)
    x = 300 * random(T, B, I, seed=2).float()
    y, _ = made(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert float(y.detach().abs().max()) <= 1
    assert all(p.grad.isfinite().all() for p in made.parameters())


# Weights --------------------------------------------------------------------------------------------------------------


def test_initial_values():
    torch.manual_seed(0)
    made = sf.SLSTM(400, 8, num_heads=2, num_layers=2)
    assert float(made.weight_ih_l0.detach().std()) == pytest.approx((2 / (5 * 400)) ** 0.5, rel=0.05)
    assert not made.weight_hh_l0.any()
    assert not made.bias_hh_l0.any()
    i, f, z, o = made.bias_ih_l1.chunk(4)
    assert not torch.cat([i, z, o]).any()
    power = 1.6  # of the last block
    torch.testing.assert_close(f, 5 - 12 * (torch.arange(4) / 3).repeat(2) ** power)
    torch.testing.assert_close(made.bias_ih_l0[8:16], 5 - 12 * (torch.arange(4) / 3).repeat(2) ** 0.3)
    assert sf.SLSTM(3, 4, num_heads=4).bias_ih_l0[4:8].tolist() == [5.0] * 4


@pytest.mark.parametrize("bias", [True, False])
def test_weights_in_the_form_of_the_package_and_back(bias):
    made = layer("slstm", num_heads=2, num_layers=2, bidirectional=True, bias=bias)
    other = sf.SLSTM(I, H, 2, num_heads=2, bidirectional=True, bias=bias, dtype=torch.float64)
    for number in range(2):
        for reverse in (False, True):
            weights = made.to_xlstm(number, reverse)
            assert {name: tuple(w.shape) for name, w in weights.items()} == {
                "W": (4 * H, 2 * H if number else I),
                "R": (2, 2 * H, H // 2),
                "b": (4 * H,),
            }
            assert other.from_xlstm(weights, number, reverse) is other
    x = random(T, B, I, seed=2)
    assert_same({"y": other(x)[0]}, {"y": made(x)[0]})


def test_the_package_has_the_gates_inside_the_heads():
    made = layer("slstm", num_heads=2)
    R, W = made.to_xlstm()["R"], made.weight_hh_l0
    for gate in range(4):
        for unit in range(H):
            assert torch.equal(R[unit // 2, gate * 2 + unit % 2], W[gate * H + unit])


def test_wrong_arguments():
    with pytest.raises(
        ValueError, match="hidden_size must be a multiple of num_heads, got 10 units for 4 heads: use 8"
    ):
        sf.SLSTM(3, 10, num_heads=4)
    with pytest.raises(ValueError, match="num_heads must be a whole number above 0, got 0"):
        sf.SLSTM(3, 4, num_heads=0)
    with pytest.raises(ValueError, match='forget_gate must be "sigmoid" or "exponential", got \'relu\''):
        sf.SLSTM(3, 4, forget_gate="relu")
    with pytest.raises(ValueError, match="which has no cell 'slstm'"):
        sf.SLSTM(3, 4, feedback="torch")
    with pytest.raises(ValueError, match=r"must have one value per unit of the state, 12 here"):
        sf.SLSTM(3, 4, feedback=torch.zeros(16))
    made = sf.SLSTM(3, 4, num_heads=2)
    with pytest.raises(ValueError, match='a sigmoid forget gate, got forget_gate="exponential"'):
        sf.SLSTM(3, 4, forget_gate="exponential").to_xlstm()
    with pytest.raises(ValueError, match="layer must be between 0 and 0, got 1"):
        made.to_xlstm(1)
    with pytest.raises(ValueError, match="reverse must be False"):
        made.to_xlstm(reverse=True)
    with pytest.raises(ValueError, match=r"are \{'W': \(16, 3\), 'R': \(2, 8, 2\)"):
        made.from_xlstm(sf.SLSTM(3, 4, num_heads=4).to_xlstm())
    with pytest.raises(ValueError, match="needs b = 0, got values up to 7"):
        sf.SLSTM(3, 4, num_heads=2, bias=False).from_xlstm(made.to_xlstm())
    with pytest.raises(RuntimeError, match=r"must be a tuple \(h, c, n, m\), got 2 tensors"):
        made(torch.zeros(2, 1, 3), (torch.zeros(1, 1, 4),) * 2)


# Operations on layers -------------------------------------------------------------------------------------------------


def test_a_stream_of_steps_is_a_sequence():
    made, x, state = layer("slstm", num_heads=2, num_layers=2), random(T, B, I, seed=2), None
    for t in range(T):
        y, state = made.step(x[t], state)
    expected, final = made(x)
    assert_same({"y": y, "state": torch.stack(state)}, {"y": expected[-1], "state": torch.stack(final)})
    with torch.no_grad():
        assert torch.equal(made(x)[0], expected)


def test_copies_pickles_and_state_dicts():
    made = layer("slstm_exp", num_heads=2, feedback="gate+1")
    again = [
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        sf.SLSTM(I, H, num_heads=2, forget_gate="exponential"),
    ]
    again[2].double().load_state_dict(made.state_dict())
    x = random(T, B, I, seed=2)
    for other in again:
        assert torch.equal(other(x)[0], made(x)[0])
    assert repr(again[1]) == "SLSTM(3, 4, num_heads=2, forget_gate='exponential', feedback='gate+1')"
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        sf.SLSTM(I, H).load_state_dict(made.state_dict())


@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_values_are_not_written_to_a_weight_that_is_computed(normalize):
    layer = normalize(sf.SLSTM(3, 8, num_heads=2), "weight_hh_l0")
    weights = sf.SLSTM(3, 8, num_heads=2).to_xlstm()
    for method in (lambda: layer.from_xlstm(weights), layer.reset_parameters):
        with pytest.raises(RuntimeError, match=r"needs weights that are parameters, got computed ones: call it before"):
            method()


def test_explain_counts_the_blocks():
    x = torch.zeros(5, 2, 16)
    dense, blocks = (sf.explain(sf.SLSTM(16, 16, num_heads=heads, feedback="gate"), x) for heads in (1, 4))
    assert dense.forward_flops == 2 * 10 * 64 * (16 + 16)
    assert blocks.forward_flops == 2 * 10 * 64 * (16 + 4)


@pytest.mark.parametrize("rule", ["gate", f"gate+{T}"])
def test_alignment(rule):
    made = layer("slstm", num_heads=2, feedback=rule)
    found = sf.alignment(made, lambda model, x: model(x)[0].square().sum(), random(T, B, I, seed=2), lags=3)
    assert (found.total.cosine > 1 - 1e-9) == ("+" in rule)


@pytest.mark.parametrize("heads", [1, 2])
def test_autocast_keeps_states_in_float32(heads):
    made = layer("slstm", num_heads=heads, feedback="gate", dtype=torch.float32)
    x = random(T, B, I, seed=2).float()
    exact, _ = made(x)
    exact.sum().backward()
    expected = {name: p.grad.clone() for name, p in made.named_parameters()}
    for inputs in (x, x.bfloat16()):
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y, final = made(inputs)
            y_lengths, _ = made(inputs, lengths=torch.tensor([T, T, T - 1]))
        assert {t.dtype for t in (y, y_lengths, *final)} == {torch.float32}
        assert not torch.equal(y, exact)
        torch.testing.assert_close(y, exact, atol=0.03, rtol=0.03)
        y.sum().backward()
        assert_same({n: p.grad for n, p in made.named_parameters()}, expected, 0.1)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("rule", ["bptt", "dsf", "gate+1", "calibrated"])
@pytest.mark.compiles
def test_torch_compile(rule):
    made, x = layer("slstm", num_heads=2, feedback=rule), random(T, B, I, seed=2)

    def gradients(module):
        leaf = x.clone().requires_grad_()
        y, final = module(leaf)
        (y.square().sum() + final[1].square().sum()).backward()
        return {"y": y, "x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}

    expected = gradients(copy.deepcopy(made))
    with torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        found = gradients(compiled)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)
