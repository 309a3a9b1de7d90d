"""Forward pass in parallel over time: states, defects and gradients against float64 loops, and the layer's property."""

import copy
import pickle

import oracles
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import statefeed as sf
from statefeed.cells import CELLS

LAYERS = {
    "gru": lambda *a, **k: sf.GRU(*a, **k),
    "lstm": lambda *a, **k: sf.LSTM(*a, **k),
    "tanh": lambda *a, **k: sf.RNN(*a, **k),
    "relu": lambda *a, **k: sf.RNN(*a, nonlinearity="relu", **k),
}
T, B, I, H = 40, 3, 4, 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(cell, *sizes, method=None, scale=1.0, **options):
    """A float64 layer, with W_hh times ``scale``."""
    layer = LAYERS[cell](*(sizes or (I, H)), dtype=torch.float64, **options)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.startswith("weight_hh"):
                weight.mul_(scale)
    layer.forward_method = method or sf.Newton(1e-12)
    return layer


def weights(layer):
    return {name.removesuffix("_l0"): p.detach() for name, p in layer.named_parameters()}


def oracle(cell, layer, x, state=None):
    """States (T + 1, B, S) by the slow loop."""
    width = H * (2 if cell == "lstm" else 1)
    initial = torch.zeros(x.shape[1], width, dtype=torch.float64) if state is None else torch.cat(state, -1)[0]
    return oracles.run(cell, weights(layer), x, initial)


def largest(a, b):
    return float((a.detach() - b.detach()).abs().max())


def tensors(found):
    """All tensors of what a layer returns."""
    if isinstance(found, torch.Tensor):
        return [found.detach()]
    if isinstance(found, PackedSequence):
        return [found.data.detach()]
    return [t for part in found for t in tensors(part)]


def both_ways(layer, *call, **options):
    """What a layer returns by its forward method, and sequentially."""
    sequential = copy.deepcopy(layer)
    sequential.forward_method = "sequential"
    return tensors(layer(*call, **options)), tensors(sequential(*call, **options))


# States ---------------------------------------------------------------------------------------------------------------


def check_states(cell, bias=True):
    layer = make(cell, bias=bias)
    x, state = torch.randn(T, B, I).double(), tuple(torch.randn(1, B, H).double() for _ in layer.feedback_cell.states)
    y, final = layer(x, state if cell == "lstm" else state[0])
    expected = oracle(cell, layer, x, state)
    assert largest(y, expected[1:, :, :H]) < 1e-10
    assert largest(torch.cat(tensors(final), -1)[0], expected[-1]) < 1e-10
    assert 2 < layer.newton_iterations[0] <= T + 1
    assert layer.newton_sequential_steps == (0,)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", LAYERS)
def test_states_are_those_of_the_loop(cell, bias):
    check_states(cell, bias)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
def test_the_check_rejects_an_error_in_the_equations(cell, monkeypatch):
    right = CELLS[cell].newton_update

    def wrong(gates, *rest):
        gates[0, 1:] += 1e-6
        return right(gates, *rest)

    monkeypatch.setattr(CELLS[cell], "newton_update", wrong, raising=False)
    with pytest.raises(AssertionError):
        check_states(cell.removeprefix("rnn_"))


def defects(cell, layer, x, y, final):
    """|h[t] - f(h[t-1], x[t])| / (1 + |h[t]|) by the slow step, (T, B, H), from the returned h; c follows from h."""
    w, h_prev = weights(layer), torch.cat([torch.zeros_like(y[:1]), y[:-1]])
    if cell != "lstm":
        stepped = torch.func.vmap(torch.func.vmap(lambda row, h: oracles.step(cell, w, row, h)))(x, h_prev)
        return (y - stepped).abs() / (1 + y.abs())
    c, found = torch.zeros_like(y[0]), []
    for row, h in zip(x, h_prev, strict=True):
        s = torch.stack([oracles.step(cell, w, r, state) for r, state in zip(row, torch.cat([h, c], -1), strict=True)])
        found.append(s[:, :H])
        c = s[:, H:]
    assert largest(c, final[1][0]) < 1e-10
    return (y - torch.stack(found)).abs() / (1 + y.abs())


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("cell", LAYERS)
def test_every_step_is_within_the_tolerance(cell, tolerance):
    layer = make(cell, method=sf.Newton(tolerance))
    x = torch.randn(T, B, I).double()
    y, final = layer(x)
    found = defects(cell, layer, x, y.detach(), final)
    assert tolerance / 1e3 < float(found.max()) <= tolerance


def test_iterations_do_not_grow_with_the_steps():
    layer = make("gru", method="newton")
    took = []
    for steps in (64, 512, 4096):
        layer(torch.randn(steps, 1, I).double())
        took += layer.newton_iterations
    assert max(took) <= min(took) + 2 < 20


# Estimates of the caller ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["padded", "batch_first", "packed", "resets"])
@pytest.mark.parametrize("cell", LAYERS)
def test_the_states_of_the_same_batch_are_a_start(cell, form):
    layer = make(cell, method=sf.Newton(1e-9, keep_states=True), num_layers=2, bidirectional=True)
    layer.batch_first = form == "batch_first"
    x = torch.randn(*((B, T) if layer.batch_first else (T, B)), I).double()
    call = (pack_padded_sequence(x, torch.tensor([T, 9, 5])) if form == "packed" else x,)
    options = {"resets": torch.rand(T, B) < 0.1} if form == "resets" else {}
    expected = tensors(layer(*call, **options))
    fewest, states = min(layer.newton_iterations), layer.newton_states
    assert len(states) == 4
    assert all(not s.requires_grad for s in states)

    layer.newton_guess = states
    found = tensors(layer(*call, **options))
    assert max(layer.newton_iterations) <= 2 < fewest
    assert max(map(largest, found, expected)) < 1e-7

    # A wrong estimate costs iterations and changes no result; it was used up.
    layer.newton_guess = [torch.randn_like(s) for s in states]
    assert max(map(largest, tensors(layer(*call, **options)), expected)) < 1e-7
    assert layer.newton_guess is None
    assert min(layer.newton_iterations) > 2


def test_the_states_of_a_projection_are_an_estimate():
    layer, x = sf.LSTM(I, H, proj_size=4, dtype=torch.float64), torch.randn(T, B, I).double()
    expected = tensors(layer(x))
    layer.forward_method = sf.Newton(keep_states=True)
    layer(x)
    layer.newton_guess = layer.newton_states
    assert max(map(largest, tensors(layer(x)), expected)) < 1e-4  # the default tolerance


def test_states_are_kept_only_on_request():
    layer = make("gru")
    layer(torch.randn(T, B, I).double())
    assert layer.newton_states == ()
    layer.forward_method = sf.Newton(keep_states=True)
    y, _ = layer(torch.randn(T, B, I).double())
    assert torch.equal(layer.newton_states[0], y)
    layer.forward_method = "sequential"
    assert layer.newton_states == ()


@pytest.mark.parametrize("guess", [[], [torch.zeros(T, B, H + 1)], [torch.zeros(T, B, H)] * 2])
def test_an_estimate_of_another_shape_raises(guess):
    layer = make("gru")
    layer.newton_guess = guess
    with pytest.raises(ValueError, match=r"newton_guess must have 1 tensors of shape \(40, 3, 8\)"):
        layer(torch.randn(T, B, I).double())


# Forms of input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}, {"batch_first": True}])
@pytest.mark.parametrize("cell", LAYERS)
def test_every_form_of_input(cell, options):
    layer = make(cell, **options)
    batch_first = options.get("batch_first", False)
    x = torch.randn(*((B, T) if batch_first else (T, B)), I).double()
    lengths = torch.tensor([T - 9, T, 5])
    resets = torch.rand(x.shape[:2]) < 0.1
    K = (2 if options.get("bidirectional") else 1) * options.get("num_layers", 1)
    state = tuple(torch.randn(K, B, H).double() for _ in layer.feedback_cell.states)
    hx = state if cell == "lstm" else state[0]
    one = tuple(s[:, 0] for s in state)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    calls = [
        ((x, hx), {}),
        ((x[0], one if cell == "lstm" else one[0]), {}),
        ((packed, hx), {}),
        ((x, hx), {"lengths": lengths}),
        ((x, hx), {"resets": resets}),
        ((x[:, :1] if batch_first else x[:1], hx), {}),
    ]
    for call, more in calls:
        ours, expected = both_ways(layer, *call, **more)
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected, strict=True):
            assert a.shape == b.shape
            assert largest(a, b) < 1e-9
    assert len(layer.newton_iterations) == K


def test_an_empty_batch():
    layer = make("lstm", num_layers=2)
    ours, expected = both_ways(layer, torch.zeros(T, 0, I).double())
    assert [t.shape for t in ours] == [t.shape for t in expected]
    assert layer.newton_iterations == (0, 0)


def test_function_transforms():
    layer = make("gru", feedback="dsf")
    x = torch.randn(T, B, I).double()
    found = torch.func.grad(lambda x: layer(x)[0].square().sum())(x)
    leaf = x.clone().requires_grad_()
    layer(leaf)[0].square().sum().backward()
    assert largest(found, leaf.grad) < 1e-12


def test_it_runs_without_autograd():
    layer = make("gru", method=sf.Newton(0.1))
    x = torch.randn(T, B, I).double()
    with torch.no_grad():
        ours, expected = both_ways(layer, x)
    assert layer.newton_iterations[0] > 1
    assert 1e-4 < largest(ours[0], expected[0]) < 0.5


def test_a_cell_with_the_general_update():
    """Cell.newton_update serves every cell with one part; here it must agree with the GRU's own."""

    class Plain(type(CELLS["gru"])):
        name = "plain"
        torch_forward = None
        newton_update = sf.cells.Cell.newton_update

    class Layer(sf.CellLayer):
        cell = Plain()

    layer, gru = Layer(I, H, dtype=torch.float64), make("gru")
    layer.load_state_dict(gru.state_dict())
    layer.forward_method = sf.Newton(1e-12)
    x = torch.randn(T, B, I).double()
    assert largest(layer(x)[0], gru(x)[0]) < 1e-10
    assert abs(layer.newton_iterations[0] - gru.newton_iterations[0]) <= 1


# Steps that do not converge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", LAYERS)
def test_the_remaining_steps_run_sequentially(cell):
    layer = make(cell, method=sf.Newton(1e-12, max_iterations=6))
    x = torch.randn(T, B, I).double()
    ours, expected = both_ways(layer, x)
    assert layer.newton_iterations == (6,)
    assert 1 <= layer.newton_sequential_steps[0] <= T - 5  # after k iterations the first k steps are exact
    for a, b in zip(ours, expected, strict=True):
        assert largest(a, b) < 1e-9


@pytest.mark.parametrize("cell", LAYERS)
def test_the_remaining_steps_of_packed_input(cell):
    layer = make(cell, method=sf.Newton(1e-12, max_iterations=6), bidirectional=True)
    packed = pack_padded_sequence(torch.randn(T, 5, I).double(), torch.tensor([40, 30, 8, 3, 1]))
    ours, expected = both_ways(layer, packed)
    assert min(layer.newton_sequential_steps) > 0
    for a, b in zip(ours, expected, strict=True):
        assert largest(a, b) < 1e-9


@pytest.mark.parametrize(("cell", "scale"), [("gru", 20.0), ("tanh", 8.0), ("relu", 8.0)])
def test_it_gives_up_on_chaotic_dynamics(cell, scale):
    layer = make(cell, I, 32, method=sf.Newton(1e-6), scale=scale)
    x = torch.randn(300, B, I).double()
    y, _ = layer(x)
    assert layer.newton_iterations[0] < 30
    assert layer.newton_sequential_steps[0] > 200
    global_h, w = y.detach(), weights(layer)
    h_prev = torch.cat([torch.zeros_like(global_h[:1]), global_h[:-1]])
    stepped = torch.func.vmap(torch.func.vmap(lambda row, h: oracles.step(cell, w, row, h)))(x, h_prev)
    assert float(((global_h - stepped).abs() / (1 + global_h.abs())).max()) <= 1e-6


def test_input_that_is_not_a_number_stays_so():
    layer = make("gru", method="newton")
    x = torch.randn(T, B, I).double()
    x[20, 1] = float("nan")
    ours, expected = both_ways(layer, x)
    assert layer.newton_sequential_steps == (20,)
    torch.testing.assert_close(ours[0], expected[0], equal_nan=True, rtol=0, atol=1e-3)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bptt", "dsf", "ft-bptt+2", "jacobian", "calibrated", "fitted"])
@pytest.mark.parametrize("cell", ["gru", "lstm", "tanh"])
def test_gradients_follow_the_rule(cell, rule):
    layer = make(cell, num_layers=2, bidirectional=True, feedback=rule)
    sequential = copy.deepcopy(layer)
    sequential.forward_method = "sequential"
    x = torch.randn(T, B, I).double()
    found = []
    for module in (layer, sequential):
        leaf = x.clone().requires_grad_()
        y, _ = module(leaf)
        found.append(torch.autograd.grad((y**2).sum(), [leaf, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_of_the_loop(cell):
    layer = make(cell)
    x, e = torch.randn(12, 2, I).double(), torch.randn(12, 2, H).double()
    y, _ = layer(x)
    found = dict(zip(weights(layer), torch.autograd.grad((y * e).sum(), list(layer.parameters())), strict=True))
    full = torch.cat([e, torch.zeros_like(e)], -1) if cell == "lstm" else e
    initial = torch.zeros(2, full.shape[-1], dtype=torch.float64)
    expected = oracles.layer_gradients(cell, weights(layer), x, initial, full, None)
    for name, gradient in found.items():
        assert largest(gradient, expected[name]) < 1e-9


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "dtype"),
    # oneDNN has no LSTM in float16.
    [*((cell, torch.bfloat16) for cell in LAYERS), ("gru", torch.float16), ("tanh", torch.float16)],
)
def test_autocast(cell, dtype):
    """The results have the dtype of the sequential pass, and its accuracy."""
    layer = make(cell, 16, 64, method="newton").float()
    x = torch.randn(50, 2, 16)
    exact, _ = both_ways(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cpu", dtype), torch.no_grad():
        ours, expected = both_ways(layer, x)
    assert layer.newton_sequential_steps == (0,)
    for a, b, c in zip(ours, expected, exact, strict=True):
        assert a.dtype == b.dtype
        assert largest(a, c) < 4 * largest(b, c) + torch.finfo(dtype).eps


@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 4, 2]])
@pytest.mark.parametrize("cell", LAYERS)
def test_packed_sequences_have_the_dtypes_of_the_sequential_pass_under_autocast(cell, lengths):
    layer = make(cell, method="newton").float()
    packed = pack_padded_sequence(torch.randn(5, 3, I), lengths)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, expected = both_ways(layer, packed)
    assert [t.dtype for t in ours] == [t.dtype for t in expected]


def test_steps_that_do_not_converge_under_autocast():
    layer = make("gru", 16, 64, method="newton", scale=20.0).float()
    x = torch.randn(60, 2, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, expected = both_ways(layer, x)
    assert layer.newton_sequential_steps[0] > 0
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.isfinite().all()
    assert largest(ours[0][:3], expected[0][:3]) < 0.1  # later, rounding errors grow


def test_rounding_errors_end_the_iteration():
    """A tolerance below the spacing of float32 cannot be met; the iteration stops where the defect no longer falls."""
    layer = make("gru", 16, 64, method=sf.Newton(1e-12)).float()
    x = torch.randn(50, 2, 16)
    ours, expected = both_ways(layer, x)
    assert layer.newton_iterations[0] < 30
    assert layer.newton_sequential_steps == (0,)
    assert largest(ours[0], expected[0]) < 2e-6


def test_bfloat16_layer():
    layer = make("gru", 16, 64, method="newton").bfloat16()
    x = torch.randn(50, 2, 16).bfloat16()
    with torch.no_grad():
        ours, expected = both_ways(layer, x)
    assert ours[0].dtype == torch.bfloat16
    assert layer.newton_sequential_steps == (0,)
    assert largest(ours[0].float(), expected[0].float()) < 0.05


# The property ---------------------------------------------------------------------------------------------------------


def test_the_default_is_sequential():
    layer = sf.GRU(I, H)
    assert layer.forward_method == "sequential"
    assert layer.newton_iterations == layer.newton_sequential_steps == ()
    assert "newton" not in repr(layer)
    layer.forward_method = "newton"
    assert layer.forward_method == sf.Newton()
    assert "forward_method='newton(0.0001)'" in repr(layer)
    layer.forward_method = "newton(1e-3)"
    layer(torch.randn(T, B, I))
    assert layer.forward_method == sf.Newton(1e-3)
    assert len(layer.newton_iterations) == 1
    layer.forward_method = "sequential"
    assert layer.newton_iterations == ()
    assert vars(layer).keys() == vars(sf.GRU(I, H)).keys()


@pytest.mark.parametrize(
    ("method", "error"),
    [("newtn", ValueError), ("newton(0)", ValueError), ("newton(x)", ValueError), (None, TypeError), (1e-4, TypeError)],
)
def test_an_invalid_method_raises(method, error):
    layer = sf.GRU(I, H)
    with pytest.raises(error, match="forward_method must be"):
        layer.forward_method = method
    assert layer.forward_method == "sequential"


@pytest.mark.parametrize("options", [{"tolerance": 0}, {"tolerance": True}, {"max_iterations": 0}])
def test_invalid_settings_raise(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        sf.Newton(**options)


def test_copies_and_pickles_have_it_and_state_dict_does_not():
    layer = make("gru", method=sf.Newton(1e-3))
    layer(torch.randn(T, B, I).double())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.forward_method == sf.Newton(1e-3)
    assert layer.state_dict().keys() == nn.GRU(I, H).state_dict().keys()


def test_a_swapped_layer_has_it_and_restore_removes_it():
    model = nn.Sequential(nn.LSTM(I, H))
    attributes = vars(model[0]).keys()
    sf.swap(model)
    assert model[0].forward_method == "sequential"
    model[0].forward_method = "newton"
    model(torch.randn(T, B, I))
    sf.restore(model)
    assert vars(model[0]).keys() == attributes


def test_layers_that_do_not_support_it_raise():
    with pytest.raises(ValueError, match='Recurrent must be "sequential"'):
        sf.Recurrent(nn.GRUCell(I, H)).forward_method = "newton"
    layer = sf.GRU(I, H, feedback="torch")
    with pytest.raises(ValueError, match='feedback "torch"'):
        layer.forward_method = "newton"
    layer.feedback, layer.forward_method = "dsf", "newton"
    with pytest.raises(ValueError, match='feedback "torch"'):
        layer.feedback = "torch"
    assert str(layer.feedback) == "dsf"


def test_a_cell_with_several_parts_needs_its_own_update():
    class Plain(type(CELLS["lstm"])):
        name = "plain"
        newton_update = sf.cells.Cell.newton_update

    class Layer(sf.CellLayer):
        cell = Plain()

    with pytest.raises(ValueError, match="newton_update"):
        Layer(I, H).forward_method = "newton"


@pytest.mark.parametrize("rule", ["bptt", "dsf"])
def test_compile_and_export_raise(rule):
    layer = sf.GRU(I, H, feedback=rule)
    layer.forward_method = "newton"
    x = torch.randn(T, B, I)
    with torch._dynamo.config.patch(allow_rnn=True):
        with pytest.raises(Exception, match="which reads its progress from the device"):
            torch.compile(layer, backend="eager", fullgraph=True)(x)
        with pytest.raises(Exception, match="which reads its progress from the device"):
            torch.export.export(layer, (x,))


def test_alignment_compares_with_the_exact_gradient():
    layer = make("gru", method=sf.Newton(1e-10), feedback="dsf")
    x = torch.randn(T, B, I).double()
    ours = sf.alignment(layer, lambda model, batch: model(batch)[0].square().sum(), x)
    assert layer.forward_method == sf.Newton(1e-10)
    layer.forward_method = "sequential"
    expected = sf.alignment(layer, lambda model, batch: model(batch)[0].square().sum(), x)
    assert abs(ours.total.cosine - expected.total.cosine) < 1e-6


@pytest.mark.parametrize("rule", ["bptt", "dsf"])
def test_explain_shows_the_last_call(rule):
    layer = sf.GRU(I, H, num_layers=2, bidirectional=True, feedback=rule)
    layer.forward_method = sf.Newton(1e-3)
    x = torch.randn(T, B, I)
    before = sf.explain(layer, x)
    assert before.iterations == ()
    assert "newton(0.001), one product over all steps" in before.forward
    assert "expected to be slower" in before.warning
    layer(x)
    after = sf.explain(layer, x)
    assert after.iterations == layer.newton_iterations
    assert f"newton    {', '.join(map(str, layer.newton_iterations))} iterations in the last call" in str(after)
    one = 2 * T * B * H * 3 * H
    assert after.forward_flops - before.forward_flops == one * (sum(layer.newton_iterations) - 4)
    timed = sf.explain(layer, x, timed=True)
    assert timed.seconds > 0
    assert layer.forward_method == sf.Newton(1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["bptt", "dsf"])
@pytest.mark.parametrize("cell", LAYERS)
def test_on_a_gpu(cell, rule):
    layer = make(cell, 16, 64, feedback=rule, method=sf.Newton(1e-10)).cuda()
    x = torch.randn(100, 3, 16, device="cuda").double()
    ours, expected = both_ways(layer, x)
    assert layer.newton_sequential_steps == (0,)
    for a, b in zip(ours, expected, strict=True):
        assert largest(a, b) < 1e-8
    layer.float()(x.float())[0].sum().backward()
    assert layer.newton_iterations[0] % 4 == 0
