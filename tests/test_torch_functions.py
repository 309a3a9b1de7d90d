"""torch's own functions for short sequences: the numbers, the errors and the randomness of torch.nn's layers."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import statefeed as sf
from statefeed import native, torch_functions

SETTINGS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3, "dropout": 0.5},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3},
]
KINDS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("GRU", {}), ("LSTM", {}), ("LSTM", {"proj_size": 3})]

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.unavailable()}")


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions that ran."""
    ran = []
    for name in ("step", "sequence"):
        function = getattr(torch_functions, name)
        monkeypatch.setattr(
            torch_functions, name, lambda *a, name=name, function=function: ran.append(name) or function(*a)
        )
    return ran


def pair(kind, **settings):
    """torch's layer, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(4, 6, **settings)
    ours = getattr(sf, kind)(4, 6, **settings)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def leaves(layer, steps, dtype, given):
    torch.manual_seed(1)
    batch_first = layer.batch_first
    x = torch.randn((2, steps, 4) if batch_first else (steps, 2, 4), dtype=dtype, requires_grad=True)
    if not given:
        return x, None
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or 6, 6] if isinstance(layer, nn.LSTM) else [6]
    state = tuple(torch.randn(rows, 2, w, dtype=dtype, requires_grad=True) for w in widths)
    return x, state if isinstance(layer, nn.LSTM) else state[0]


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in tensors(part)]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("kind", "more"), KINDS, ids=str)
def test_values_gradients_and_dropout_are_torchs(kind, more, settings, steps, given, calls):
    found = []
    for layer in pair(kind, **more, **settings):
        layer.double()
        x, hx = leaves(layer, steps, torch.float64, given)
        torch.manual_seed(2)
        outputs = tensors(layer(x, hx))
        grads = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
        inputs = [x, *([] if hx is None else tensors(hx)), *layer.parameters()]
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, grads)])
    expected = "step" if steps == 1 and "proj_size" not in more else "sequence"
    assert calls in ([expected], [])  # [] where the table has no such shape
    assert calls or steps == 2
    for theirs, ours in zip(*found, strict=True):
        assert theirs.shape == ours.shape
        assert theirs.stride() == ours.stride() or theirs.dim() == 3
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 1, 2], [1, 3, 2]], ids=str)
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize(("kind", "more"), KINDS, ids=str)
def test_packed_values_and_gradients_are_torchs(kind, more, settings, lengths, given, calls):
    found = []
    for layer in pair(kind, **more, **settings):
        layer.double()
        torch.manual_seed(1)
        x = torch.randn(max(lengths), 3, 4, dtype=torch.float64, requires_grad=True)
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        widths = [layer.proj_size or 6, 6] if kind == "LSTM" else [6]
        state = tuple(torch.randn(rows, 3, w, dtype=torch.float64, requires_grad=True) for w in widths)
        hx = None if not given else state if kind == "LSTM" else state[0]
        y, final = layer(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), hx)
        outputs = [y.data, *tensors(final)]
        grads = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
        inputs = [x, *(state if given else []), *layer.parameters()]
        found.append([*outputs, *y[1:], *torch.autograd.grad(outputs, inputs, grads)])
    assert calls == ["step" if max(lengths) == 1 and "proj_size" not in more else "sequence"]
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_bfloat16_is_torchs_up_to_its_rounding(kind, calls):
    theirs, ours = pair(kind)
    x = torch.randn(1, 8, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        right, found = (tensors(layer(x)) for layer in (theirs, ours))
    assert calls == ["step"]
    for a, b in zip(found, right, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_change_of_the_outputs_in_place_leaves_the_final_state(kind, calls):
    _, ours = pair(kind)
    with torch.no_grad():
        y, state = ours(torch.randn(1, 2, 4))
        before = [s.clone() for s in tensors(state)]
        y.zero_()
    assert calls == ["step"]
    assert all(torch.equal(s, b) and s.any() for s, b in zip(tensors(state), before, strict=True))


def test_a_second_derivative_is_torchs(calls):
    found = []
    for layer in pair("GRU"):
        layer.double()
        x, _ = leaves(layer, 1, torch.float64, False)
        (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert calls == ["step"]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("hx", [torch.zeros(2, 2, 6), torch.zeros(1, 3, 6), (torch.zeros(1, 2, 6),)])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_wrong_state_has_torchs_error(kind, hx, calls):
    messages = []
    for layer in pair(kind):
        with pytest.raises(Exception) as error:  # noqa: PT011 - whatever torch raises
            layer(torch.zeros(1, 2, 4), hx)
        messages.append((error.type, str(error.value)))
    assert messages[0] == messages[1]
    assert not calls


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 2, 5), torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 1, 2, 4)]
)
def test_a_wrong_input_has_torchs_error(x, calls):
    messages = []
    for layer in pair("GRU"):
        with pytest.raises(Exception) as error:  # noqa: PT011
            layer(x)
        messages.append((error.type, str(error.value)))
    assert messages[0] == messages[1]
    assert not calls


def test_the_rule_torch_runs_the_layer_of_torch_nn(calls):
    sf.GRU(4, 6, feedback="torch")(torch.zeros(1, 2, 4))
    assert not calls
