"""RNN, GRU and LSTM as replacements of torch.nn's: constructors, input forms, and operations on layers."""

import copy
import io
import pickle

import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import SAME_BY_CANCELLATION, assert_as_accurate, assert_different, assert_same, error
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import statefeed as sf

pytestmark = pytest.mark.filterwarnings("ignore:the initial state", "ignore:feedback .* adds corrections")

CELLS = ["tanh", "relu", "gru", "lstm", "lstm_projected"]
DIAGONALS = ["ft-bptt", "dsf", "0.5", "calibrated", "gate", "jacobian"]
EXAMPLES = settings(deadline=None, derandomize=True, database=None, max_examples=80)
FEWER = settings(EXAMPLES, max_examples=40)


def widths(cell, H):
    """Widths of the parts of the state."""
    return {"lstm": (H, H), "lstm_projected": (H // 2, H)}.get(cell, (H,))


def layer(cell, torchs=False, feedback="dsf", **options):
    """A layer of ours or of torch's; the same seed gives both the same weights."""
    torch.manual_seed(0)
    package = nn if torchs else sf
    cls = {"gru": package.GRU, "lstm": package.LSTM, "lstm_projected": package.LSTM}.get(cell, package.RNN)
    options = {"input_size": 3, "hidden_size": 4} | options
    if cell == "lstm_projected":
        options = {"proj_size": widths(cell, options["hidden_size"])[0]} | options
    options |= {"nonlinearity": cell} if cls is package.RNN else {}
    made = cls(**options, **({} if torchs else {"feedback": feedback}))
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.4)
    return made


def tensors(value):
    """The tensors in what a layer returns, whatever its form."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in tensors(part)]


def run(made, x, hx=None, lengths=None, enforce_sorted=True, seed=0):
    """Outputs, and the gradients of a fixed loss on all of them: for parameters, the input, the initial state."""
    x = x.detach().clone().requires_grad_()
    states = [s.detach().clone().requires_grad_() for s in (hx or ())]
    given_x = x
    if lengths is not None:
        given_x = pack_padded_sequence(x, lengths, made.batch_first, enforce_sorted)
    made.zero_grad()
    torch.manual_seed(seed)
    answer = made(given_x, None if hx is None else states[0] if len(states) == 1 else tuple(states))
    outputs = tensors(answer)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, dtype=torch.float64, generator=generator) for y in outputs]
    sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    gradients = {name: p.grad.clone() for name, p in made.named_parameters()} | {"x": x.grad}
    gradients |= {f"initial{n}": s.grad for n, s in enumerate(states)}
    return answer, {f"y{n}": y.detach() for n, y in enumerate(outputs)}, gradients


@st.composite
def forms(draw, dtypes=(torch.float64,)):
    """A cell, constructor arguments of torch.nn, an input in one of its forms, and an initial state or none."""
    cell = draw(st.sampled_from(CELLS))
    layers, two_ways = draw(st.integers(1, 3)), draw(st.booleans())
    options = {
        "input_size": draw(st.integers(1, 4)),
        "hidden_size": draw(st.integers(2 if cell == "lstm_projected" else 1, 5)),
        "num_layers": layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.4])) if layers > 1 else 0.0,
        "bidirectional": two_ways,
        "dtype": draw(st.sampled_from(dtypes)),
    }
    form = draw(st.sampled_from(["unbatched", "batched", "sorted", "unsorted"]))
    T, batch = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(options["dtype"])

    shape = (T,) if form == "unbatched" else (batch, T) if options["batch_first"] else (T, batch)
    states = (layers * (1 + two_ways), *(() if form == "unbatched" else (batch,)))
    call = {"x": random(*shape, options["input_size"])}
    if draw(st.booleans()):
        call["hx"] = [random(*states, width) for width in widths(cell, options["hidden_size"])]
    if form in ("sorted", "unsorted"):
        lengths = draw(st.lists(st.integers(1, T), min_size=batch, max_size=batch))
        call["lengths"] = sorted(lengths, reverse=True) if form == "sorted" else lengths
        call["enforce_sorted"] = form == "sorted"
    return cell, options, call, T


# Against torch --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(forms(dtypes=(torch.float64, torch.float32)), st.sampled_from(["dsf", "jacobian+1"]), st.booleans())
def test_forward_and_bptt_are_torchs_in_every_form(form, rule, training):
    cell, options, call, _ = form
    exact = options["dtype"] == torch.float64
    theirs = layer(cell, torchs=True, **options).train(training)
    expected, outputs, gradients = run(theirs, **call)
    for ours in (layer(cell, feedback=rule, **options), layer(cell, feedback="torch", **options)):
        ours.load_state_dict(theirs.state_dict(), strict=True)
        found, our_outputs, our_gradients = run(ours.train(training), **call)
        assert type(found[0]) is type(expected[0])
        assert type(found[1]) is type(expected[1])
        assert [t.dtype for t in tensors(found)] == [t.dtype for t in tensors(expected)]
        if isinstance(found[0], PackedSequence):
            for one, other in zip(found[0][1:], expected[0][1:], strict=True):
                assert (one is None and other is None) or torch.equal(one, other)
        assert_same(our_outputs, outputs, *([] if exact else [1e-5]))
        if ours.feedback == sf.Feedback("torch"):
            assert_same(our_gradients, gradients, *([] if exact else [1e-5]))
        with torch.no_grad():
            torch.manual_seed(0)
            again = tensors(ours(*arguments(ours, **call)))
        assert_same({f"y{n}": y for n, y in enumerate(again)}, outputs, *([] if exact else [1e-5]))


def arguments(made, x, hx=None, lengths=None, enforce_sorted=True):
    """The positional arguments of the call."""
    x = x if lengths is None else pack_padded_sequence(x, lengths, made.batch_first, enforce_sorted)
    return x, None if hx is None else hx[0] if len(hx) == 1 else tuple(hx)


@EXAMPLES
@given(forms(), st.sampled_from(DIAGONALS))
def test_as_many_corrections_as_steps_are_bptt_in_every_form(form, name):
    cell, options, call, T = form
    assume(name != "gate" or cell not in ("tanh", "relu"))
    theirs = layer(cell, torchs=True, **options)
    ours = layer(cell, feedback=f"{name}+{T}", **options)
    assert_same(run(ours, **call)[2], run(theirs, **call)[2], SAME_BY_CANCELLATION)


@FEWER
@given(forms(dtypes=(torch.float32,)), st.sampled_from(["ft-bptt", "jacobian"]))
def test_as_many_corrections_as_steps_are_as_accurate_as_bptt_in_float32(form, name):
    cell, options, call, T = form
    options["dropout"] = 0.0  # its mask is another one in float64
    theirs = layer(cell, torchs=True, **options)
    ours = layer(cell, feedback=f"{name}+{T}", **options)
    in_float64 = {
        key: [t.double() for t in v] if key == "hx" else v.double() if key == "x" else v for key, v in call.items()
    }
    found, reference = run(ours, **call)[2], run(theirs, **call)[2]
    assert_as_accurate(found, reference, run(theirs.double(), **in_float64)[2])


# Against the equations ------------------------------------------------------------------------------------------------


@FEWER
@given(forms(), st.sampled_from([*DIAGONALS, "fitted"]), st.integers(0, 1))
def test_every_rule_has_the_gradient_of_its_equations_in_every_form(form, name, corrections):
    """Layers, directions and packing: every sequence alone through the oracle, whatever it shares its batch with."""
    cell, options, call, T = form
    assume(name != "gate" or cell not in ("tanh", "relu"))
    options |= {"dropout": 0.0, "hidden_size": max(options["hidden_size"], 2)}
    if "hx" in call:
        shapes = [(*call["hx"][0].shape[:-1], width) for width in widths(cell, options["hidden_size"])]
        call["hx"] = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    ours = layer(cell, feedback=sf.Feedback(name, corrections=corrections), **options)
    answer, _, found = run(ours, **call)

    # The weights of the outputs in the loss of ``run``.
    generator = torch.Generator().manual_seed(1)
    outputs = tensors(answer)
    e = [torch.randn(y.shape, dtype=torch.float64, generator=generator) for y in outputs]
    x, final = call["x"], torch.cat(e[1:], -1)
    states = torch.cat(call["hx"], -1) if "hx" in call else torch.zeros_like(final)
    lengths = call.get("lengths", [T] * (1 if x.dim() == 2 else final.shape[1]))
    e_y = e[0]
    if "lengths" in call:
        e_y = pad_packed_sequence(answer[0]._replace(data=e_y), ours.batch_first)[0]
    if x.dim() == 2:
        x, e_y, states, final = x[:, None], e_y[:, None], states[:, None], final[:, None]
    elif ours.batch_first:
        x, e_y = x.transpose(0, 1), e_y.transpose(0, 1)
    sequences = [x[:n, b] for b, n in enumerate(lengths)]
    weights = [e_y[:n, b] for b, n in enumerate(lengths)]
    diagonal = {"calibrated": lambda _, mean: mean, "ft-bptt": 0.0, "0.5": 0.5}.get(name, name)
    state = {key: value for key, value in ours.state_dict().items() if key in found}
    rule = None if name == "fitted" else (diagonal, corrections)  # whose first pass is exact
    expected = oracles.network(cell, state, sequences, states, weights, final, rule)

    assert_same({key: found[key] for key in state}, {key: expected.gradients[key] for key in state})
    dx = (
        found["x"][:, None] if found["x"].dim() == 2 else found["x"].transpose(0, 1) if ours.batch_first else found["x"]
    )
    for b, n in enumerate(lengths):
        assert error(dx[:n, b], expected.inputs[b]) < SAME_BY_CANCELLATION
        assert not dx[n:, b].any()
    if "hx" in call:
        initial = torch.cat([found[f"initial{n}"] for n in range(len(call["hx"]))], -1)
        initial = initial[:, None] if initial.dim() == 2 else initial
        assert_same({"initial": initial}, {"initial": expected.gradients["initial"]})
    if name == "calibrated":
        assert_same({"diagonal": ours.diagonal}, {"diagonal": expected.diagonals})
    if name == "fitted":
        assert_same({"diagonal": ours.diagonal}, {"diagonal": expected.fits.nan_to_num()}, SAME_BY_CANCELLATION)


@pytest.mark.parametrize("cell", CELLS)
def test_a_diagonal_may_have_a_row_for_every_layer_and_direction(cell):
    made = layer(cell, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, width = torch.randn(5, 1, 3, dtype=torch.float64), sum(widths(cell, 4))
    rows = torch.rand(4, width, dtype=torch.float64)
    made.feedback = rows
    answer, _, found = run(made, x)
    generator = torch.Generator().manual_seed(1)
    e = [torch.randn(y.shape, dtype=torch.float64, generator=generator) for y in tensors(answer)]
    zeros = torch.zeros(4, 1, width, dtype=torch.float64)
    state = dict(made.state_dict())
    expected = oracles.network(
        cell, state, [x[:, 0]], zeros, [e[0][:, 0]], torch.cat(e[1:], -1), (lambda place, _: rows[place], 0)
    )
    assert_same({key: found[key] for key in state}, {key: expected.gradients[key] for key in state})
    made.feedback = rows.flip(0)
    assert_different(run(made, x)[2], found)
    for wrong in (rows[:3], rows[:, 1:], rows[0, 1:]):
        with pytest.raises(ValueError, match=r"a row of them for every layer and direction, 4 here, got [^\n]+$"):
            made.feedback = wrong


@pytest.mark.parametrize("rule", ["calibrated", "fitted"])
def test_a_learned_diagonal_set_as_the_rule_is_frozen(rule):
    made = layer("lstm", feedback=rule, num_layers=2)
    x = torch.randn(5, 2, 3)
    run(made, x)
    made.eval()
    expected = run(made, x)[2]
    made.feedback = made.diagonal
    made.train()
    assert_same(run(made, x)[2], expected)


# Edges and errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dsf", "calibrated", "jacobian+1", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_gives_empty_results_and_no_update(cell, rule):
    ours = layer(cell, feedback=rule, num_layers=2, bidirectional=True)
    theirs = layer(cell, torchs=True, num_layers=2, bidirectional=True)
    x = torch.zeros(5, 0, 3)
    found, expected = run(ours, x), run(theirs, x)
    assert_same(found[1], expected[1])
    assert_same(found[2], expected[2])
    if rule == "calibrated":
        assert not ours.diagonal.any()


WRONG = {
    "no steps": lambda h: (torch.zeros(0, 2, 3),),
    "four axes": lambda h: (torch.zeros(1, 1, 1, 3),),
    "one axis": lambda h: (torch.zeros(3),),
    "another input width": lambda h: (torch.zeros(5, 2, 4),),
    "another dtype": lambda h: (torch.zeros(5, 2, 3, dtype=torch.float64),),
    "integers": lambda h: (torch.zeros(5, 2, 3, dtype=torch.int64),),
    "a state without batch": lambda h: (torch.zeros(5, 2, 3), h(1, 4)),
    "a state with batch": lambda h: (torch.zeros(5, 3), h(1, 1, 4)),
    "a state of another batch": lambda h: (torch.zeros(5, 2, 3), h(1, 3, 4)),
    "a state of another width": lambda h: (torch.zeros(5, 2, 3), h(1, 2, 5)),
    "a state of more layers": lambda h: (torch.zeros(5, 2, 3), h(2, 2, 4)),
    "a state of another dtype": lambda h: (torch.zeros(5, 2, 3), h(1, 2, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("cell", CELLS)
def test_errors_are_those_of_torch(cell, wrong):
    def state(*shape, **options):
        zeros = torch.zeros(*shape, **options)
        h = zeros[..., :-2] if cell == "lstm_projected" else zeros
        return (h, zeros) if cell.startswith("lstm") else zeros

    call = WRONG[wrong](state)
    with pytest.raises(Exception, match=r".+") as theirs:
        layer(cell, torchs=True)(*call)
    for rule in ("dsf", "jacobian+1"):
        with pytest.raises(theirs.type, match=r".+"):
            layer(cell, feedback=rule)(*call)


def test_the_state_of_an_lstm_is_a_pair():
    """A tensor with two layers would unpack into two states, and a third state would be ignored."""
    ours, theirs = layer("lstm", num_layers=2), layer("lstm", torchs=True, num_layers=2)
    x, h = torch.zeros(5, 2, 3), torch.zeros(2, 2, 4)
    for call in (lambda made: made(x, (h, h, h)), lambda made: made(x, torch.stack([h, h]))):
        with pytest.raises((RuntimeError, TypeError), match=r".+") as refused:
            call(theirs)
        with pytest.raises(refused.type, match=r"^hx of LSTM must be a pair \(h, c\), got [^\n]+$"):
            call(ours)
    assert torch.equal(ours(x, [h, h])[0], ours(x, (h, h))[0])


@pytest.mark.parametrize("size", [-1, 4])
def test_a_projection_must_be_smaller_than_the_hidden_state(size):
    with pytest.raises(ValueError, match=r"^proj_size[^\n]+$"):
        sf.LSTM(3, 4, proj_size=size)


@pytest.mark.parametrize("wrong", [{"hidden_size": 0}, {"hidden_size": -1}, {"num_layers": 0}, {"dropout": 1.5}])
@pytest.mark.parametrize("cell", CELLS)
def test_constructors_raise_as_torch_does(cell, wrong):
    with pytest.raises(ValueError, match=r".+") as theirs:
        layer(cell, torchs=True, **wrong)
    with pytest.raises(ValueError, match=r".+") as ours:
        layer(cell, **wrong)
    assert str(ours.value) == str(theirs.value)


def test_positional_arguments_are_those_of_torch():
    for ours, theirs in (
        (sf.RNN(2, 3, 2, "relu", False, True, 0.1, True), nn.RNN(2, 3, 2, "relu", False, True, 0.1, True)),
        (sf.GRU(2, 3, 2, False, True, 0.1, True), nn.GRU(2, 3, 2, False, True, 0.1, True)),
        (sf.LSTM(2, 3, 2, False, True, 0.1, True), nn.LSTM(2, 3, 2, False, True, 0.1, True)),
    ):
        assert repr(ours).replace(", feedback='bptt'", "") == repr(theirs)
        assert ours.mode == theirs.mode
        assert [(n, p.shape) for n, p in ours.named_parameters()] == [
            (n, p.shape) for n, p in theirs.named_parameters()
        ]


def test_a_parameter_as_the_rule_is_a_fixed_diagonal():
    made = sf.GRU(3, 4, feedback=nn.Parameter(torch.full((4,), 0.5)))
    assert str(made.feedback) == "tensor(4)"
    assert made.state_dict().keys() == nn.GRU(3, 4).state_dict().keys()


@pytest.mark.parametrize("rule", ["dsf", "calibrated", "jacobian+1", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_on_meta_gives_shapes_as_torchs_does(cell, rule):
    ours = layer(cell, feedback=rule, num_layers=2, device="meta")
    theirs = layer(cell, torchs=True, num_layers=2, device="meta")
    for made in (ours, theirs):
        made(torch.zeros(5, 2, 3, device="meta"))[0].sum().backward()
    shapes = [[(p.grad.device.type, p.grad.shape) for p in made.parameters()] for made in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("rule", ["calibrated", "fitted"])
def test_reset_parameters_resets_the_learned_diagonal(rule):
    made = layer("gru", feedback=rule, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        made.diagonal.fill_(float("nan"))  # as uninitialized memory may contain
        made.diagonal_updates.fill_(7)
    made.reset_parameters()
    assert not made.diagonal.any()
    assert not made.diagonal_updates.any()
    torch.manual_seed(0)
    made.reset_parameters()
    torch.manual_seed(0)
    assert made.state_dict().keys() == (plain := nn.GRU(3, 4).state_dict()).keys()
    assert all(torch.equal(w, plain[name]) for name, w in made.state_dict().items())


@pytest.mark.parametrize("cell", CELLS)
def test_a_batch_that_overflows_does_not_spoil_a_calibrated_diagonal(cell):
    made, x = layer(cell, feedback="calibrated"), torch.randn(5, 2, 3)
    run(made, x)
    run(made, torch.full_like(x, float("nan")))
    run(made, x)
    assert made.diagonal.any()
    assert made.diagonal.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_after_an_overflow_the_next_pass_fits_the_diagonal(cell):
    """A GradScaler begins with scales that overflow."""
    made, exact = layer(cell, feedback="fitted").double(), layer(cell, feedback="torch").double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    (made(x)[0].sum() * float("inf")).backward()
    assert not made.diagonal.any()
    assert_same(run(made, x)[2], run(exact, x)[2])
    assert made.diagonal.any()
    assert made.diagonal.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_seed_draws_the_same_weights(cell):
    torch.manual_seed(3)
    ours = {"gru": sf.GRU, "lstm": sf.LSTM}.get(cell, sf.RNN)(3, 4, 2, feedback="calibrated")
    torch.manual_seed(3)
    theirs = {"gru": nn.GRU, "lstm": nn.LSTM}.get(cell, nn.RNN)(3, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


# Operations on a layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dsf", "calibrated", "gate+1", "torch"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_state_dicts_go_both_ways(cell, rule):
    ours, theirs = layer(cell, feedback=rule, num_layers=2), layer(cell, torchs=True, num_layers=2)
    run(ours, torch.randn(5, 2, 3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    nn.init.normal_(theirs.weight_hh_l1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.weight_hh_l1, theirs.weight_hh_l1)
    nn.init.normal_(ours.weight_ih_l0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours.weight_ih_l0, theirs.weight_ih_l0)
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}


def saved(made):
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made)), saved])
@pytest.mark.parametrize("rule", ["dsf", "calibrated+1", "torch", "tensor"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_copy_computes_the_same_and_is_independent(cell, rule, again):
    rule = torch.linspace(0, 0.8, sum(widths(cell, 4))) if rule == "tensor" else rule
    made = layer(cell, feedback=rule, num_layers=2)
    x = torch.randn(5, 2, 3)
    run(made, x)
    made.eval()
    other = again(made)
    assert type(other) is type(made)
    assert other.feedback == made.feedback
    _, outputs, gradients = run(made, x)
    _, other_outputs, other_gradients = run(other, x)
    assert_same(other_outputs, outputs)
    assert_same(other_gradients, gradients)
    with torch.no_grad():
        made.weight_hh_l0.zero_()
    made.feedback = "ft-bptt"
    made.train()
    assert_same(run(other, x)[1], outputs)
    assert_same(run(other, x)[2], gradients)


def test_a_layer_is_one_of_torchs():
    assert isinstance(sf.RNN(1, 1), nn.RNN)
    assert isinstance(sf.GRU(1, 1), nn.GRU)
    assert isinstance(sf.LSTM(1, 1), nn.LSTM)
    assert all(isinstance(cls(1, 1), nn.RNNBase) for cls in (sf.RNN, sf.GRU, sf.LSTM))


@pytest.mark.parametrize("cell", CELLS)
def test_converting_a_layer_converts_the_calibrated_diagonal(cell):
    made = layer(cell, feedback="calibrated")
    run(made, torch.randn(5, 2, 3))
    before = made.diagonal.clone()
    made.double()
    assert made.diagonal.dtype == torch.float64
    assert_same({"diagonal": made.diagonal}, {"diagonal": before.double()})
    run(made, torch.randn(5, 2, 3, dtype=torch.float64))
    made.to("meta")
    assert made.diagonal.is_meta


class Twice(nn.Module):
    """A parametrization: the weight is twice what is stored."""

    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("rule", ["dsf", "jacobian+1", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_parametrized_weight_is_read_at_every_call(cell, rule):
    x = torch.randn(5, 2, 3)
    made, plain = layer(cell, feedback=rule), layer(cell, feedback=rule)
    parametrize.register_parametrization(made, "weight_hh_l0", Twice())
    for scale in (1.0, 0.5):  # the second time, the stored weight has changed
        with torch.no_grad():
            made.parametrizations.weight_hh_l0.original.mul_(scale)
            plain.weight_hh_l0.copy_(2 * made.parametrizations.weight_hh_l0.original)
        _, outputs, gradients = run(made, x)
        _, expected_outputs, expected = run(plain, x)
        expected["parametrizations.weight_hh_l0.original"] = 2 * expected.pop("weight_hh_l0")
        assert_same(outputs, expected_outputs, 1e-6)
        assert_same(gradients, expected, 1e-6)
        with torch.no_grad():
            assert error(made(x)[0], expected_outputs["y0"]) < 1e-6


@pytest.mark.parametrize("rule", ["dsf", "jacobian+1", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_functional_call_uses_its_weights(cell, rule):
    x, made, other = torch.randn(5, 2, 3), layer(cell, feedback=rule), layer(cell, feedback=rule)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    given_weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    y, _ = functional_call(made, given_weights, (x,))
    expected, _ = other(x)
    assert error(y, expected) < 1e-6
    found = torch.autograd.grad(y.sum(), list(given_weights.values()))
    wanted = torch.autograd.grad(expected.sum(), list(other.parameters()))
    assert_same(dict(zip(given_weights, found, strict=True)), dict(zip(given_weights, wanted, strict=True)), 1e-6)
    assert all(p.grad is None for p in made.parameters())
    with torch.no_grad():
        assert error(functional_call(made, given_weights, (x,))[0], expected) < 1e-6


@pytest.mark.parametrize("cell", CELLS)
def test_a_weight_that_is_replaced_or_shared_is_the_one_used(cell):
    made, other = layer(cell, num_layers=2), layer(cell, num_layers=2)
    made.weight_hh_l1 = made.weight_hh_l0
    with torch.no_grad():
        other.weight_hh_l1.copy_(other.weight_hh_l0)
    x = torch.randn(5, 2, 3)
    (_, found, gradients), (_, expected, wanted) = run(made, x), run(other, x)
    assert_same(found, expected, 1e-6)
    assert error(gradients["weight_hh_l0"], wanted["weight_hh_l0"] + wanted["weight_hh_l1"]) < 1e-5


@pytest.mark.parametrize("cell", CELLS)
def test_two_calls_before_one_backward_are_independent(cell):
    made, first, second = layer(cell), torch.randn(5, 2, 3), torch.randn(3, 1, 3)
    (made(first)[0].sum() + made(second)[0].sum()).backward()
    together = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    made(first)[0].sum().backward()
    made(second)[0].sum().backward()
    assert_same({name: p.grad for name, p in made.named_parameters()}, together, 1e-5)


@pytest.mark.parametrize("rule", ["dsf", "calibrated"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_checkpointed_call_has_the_same_gradient(cell, rule):
    made, x = layer(cell, feedback=rule, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    other = copy.deepcopy(made)
    _, _, expected = run(other, x)
    x = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    outputs = tensors(checkpoint(made, x, use_reentrant=False))
    weights = [torch.randn(y.shape, dtype=torch.float64, generator=generator) for y in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    assert_same({name: p.grad for name, p in made.named_parameters()} | {"x": x.grad}, expected)
    if rule == "calibrated":
        assert_same({"diagonal": made.diagonal}, {"diagonal": other.diagonal})


@pytest.mark.parametrize("cell", CELLS)
def test_strided_inputs(cell):
    made = layer(cell, dtype=torch.float64)
    x = torch.randn(10, 4, 6, dtype=torch.float64)[::2, ::2, ::2]
    hx = [torch.randn(1, 4, 2 * width, dtype=torch.float64)[:, ::2, ::2] for width in widths(cell, 4)]
    found = run_as_is(made, x, hx)
    expected = run_as_is(made, x.contiguous(), [h.contiguous() for h in hx])
    assert_same(found, expected)


def run_as_is(made, x, hx):
    """Outputs and weight gradients, with the strides of the arguments unchanged."""
    made.zero_grad()
    outputs = tensors(made(x, hx[0] if len(hx) == 1 else tuple(hx)))
    outputs[0].square().sum().backward()
    return {"y": outputs[0]} | {name: p.grad.clone() for name, p in made.named_parameters()}


# Half precision and compilation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["jacobian+7", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_is_as_accurate_as_torchs(cell, rule):
    ours, theirs = layer(cell, feedback=rule, num_layers=2), layer(cell, torchs=True, num_layers=2)
    x = torch.randn(7, 3, 3)
    answers = []
    for made in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            answers.append(run(made, x))
    exact = run(theirs.double(), x.double())
    assert [t.dtype for t in tensors(answers[0][0])] == [t.dtype for t in tensors(answers[1][0])]
    assert all(g.dtype == torch.float32 for g in answers[0][2].values())
    for found, reference, expected in zip(answers[0][1:], answers[1][1:], exact[1:], strict=True):
        assert largest(found, expected) <= 4 * max(largest(reference, expected), 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_weights_are_as_accurate_as_torchs(cell):
    ours = layer(cell, feedback="jacobian+7", num_layers=2).bfloat16()
    theirs = layer(cell, torchs=True, num_layers=2).bfloat16()
    x = torch.randn(7, 3, 3).bfloat16()
    found, reference = run(ours, x), run(theirs, x)
    exact = run(theirs.double(), x.double())
    assert [t.dtype for t in tensors(found[0])] == [t.dtype for t in tensors(reference[0])]
    assert all(g.dtype == torch.bfloat16 for g in found[2].values())
    for value, other, expected in zip(found[1:], reference[1:], exact[1:], strict=True):
        assert largest(value, expected) <= 4 * max(largest(other, expected), 8 * torch.finfo(torch.bfloat16).eps)


def largest(actual, expected):
    return max(error(actual[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize(
    ("cell", "rule"), [*((cell, "dsf") for cell in CELLS), ("gru", "gate+1"), ("lstm", "calibrated")]
)
@pytest.mark.compiles
def test_a_compiled_layer_is_one_graph_and_computes_the_same(cell, rule):
    made = layer(cell, feedback=rule, bidirectional=True, dtype=torch.float64)
    other = copy.deepcopy(made)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        answers = []
        for call in (compiled, other):
            leaf = x.clone().requires_grad_()
            y, last = call(leaf)
            (y.square().sum() + tensors(last)[0].sum()).backward()
            answers.append({"y": y.detach(), "x": leaf.grad})
    assert_same(*answers)
    found, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (made, other))
    assert_same(found, expected)
    if rule == "calibrated":
        assert_same({"diagonal": made.diagonal}, {"diagonal": other.diagonal})


@pytest.mark.parametrize("cell", CELLS)
def test_no_layer_of_a_network_falls_back_to_exact_gradients(cell):
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    found = run(layer(cell, **options), x)[2]
    assert_different(found, run(layer(cell, torchs=True, **options), x)[2])
