"""The forward pass where no backward pass can follow: the same numbers as with autograd, and nothing is saved."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import statefeed as sf
from statefeed import native as kernels

LAYERS = {"rnn": sf.RNN, "gru": sf.GRU, "lstm": sf.LSTM}
TORCHS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
RULES = ["bptt", "dsf", "gate", "jacobian+1", "calibrated"]
WITHOUT = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.unavailable()}")
every_layer = pytest.mark.parametrize("cell", LAYERS)


class Saved(TorchDispatchMode):
    """Records what every forward kernel was given to save in."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.statefeed.layer_forward.default:
            self.found.append([t is not None for t in args[9:11]])
        return function(*args, **(kwargs or {}))


def tensors(result):
    y, state = result
    return [y if isinstance(y, torch.Tensor) else y.data, *(state if isinstance(state, tuple) else (state,))]


def autocast(on):
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def rules_of(cell):
    return [rule for rule in RULES if cell != "rnn" or rule != "gate"]


@needs_kernels
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mode", WITHOUT)
@every_layer
def test_the_numbers_are_those_with_autograd(cell, mode, bf16):
    torch.manual_seed(0)
    for rule in rules_of(cell):
        for T, B, directions in ((1, 1, 1), (1, 3, 1), (2, 3, 1), (7, 3, 2), (20, 16, 1), (100, 2, 2)):
            layer = LAYERS[cell](6, 24, 2, bidirectional=directions == 2, feedback=rule)
            x, h = torch.randn(T, B, 6), torch.randn(2 * directions, B, 24)
            hx = (h, h.flip(1)) if cell == "lstm" else h
            packed = pack_padded_sequence(x, torch.full((B,), T), enforce_sorted=False)
            for training in (True, False):
                layer.train(training)
                for arguments in ((x,), (x, hx), (packed,)):
                    with autocast(bf16):
                        expected = tensors(layer(*arguments))
                        with WITHOUT[mode]():
                            found = tensors(layer(*arguments))
                    # In float32 torch's own layer may run short inputs, to the rounding of other sums.
                    exactly = {"rtol": 0, "atol": 0} if bf16 or T > 20 else {}
                    torch.testing.assert_close(found, [t.detach() for t in expected], **exactly)


@needs_kernels
@pytest.mark.parametrize("mode", WITHOUT)
@every_layer
def test_nothing_is_saved(cell, mode):
    x = torch.randn(60, 16, 64)
    for rule in rules_of(cell):
        layer = LAYERS[cell](64, 64, feedback=rule)
        for frozen in (False, True):
            with Saved() as saved:
                layer.requires_grad_(not frozen)(x)
            assert saved.found == [[cell != "rnn" and not frozen] * 2]
        with Saved() as saved, WITHOUT[mode]():
            layer.requires_grad_()(x)
        assert saved.found == [[False, False]]


@needs_kernels
def test_a_frozen_layer_saves_for_the_gradient_of_its_input_or_state():
    layer = sf.LSTM(3, 4).requires_grad_(False)
    x, h = torch.randn(20, 2, 3), torch.randn(1, 2, 4)
    for inputs in ((x.clone().requires_grad_(),), (x, (h, h.clone().requires_grad_()))):
        with Saved() as saved:
            y, _ = layer(*inputs)
        assert y.requires_grad
        assert saved.found == [[True, True]]


@every_layer
def test_steps_equal_one_call_on_the_sequence(cell):
    torch.manual_seed(0)
    for rule in rules_of(cell):
        layer, x, state, outputs = LAYERS[cell](3, 4, 2, feedback=rule), torch.randn(5, 2, 3), None, []
        for t in range(5):
            y, state = layer.step(x[t], state)
            outputs.append(y)
        expected, _ = layer(x)
        torch.testing.assert_close(torch.stack(outputs), expected.detach())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in its derivatives
@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_forward_mode_differentiation_is_torchs(cell):
    """Kernels without autograd would drop the tangent."""
    layer, plain = LAYERS[cell](3, 4), TORCHS[cell](3, 4)
    plain.load_state_dict(layer.state_dict())
    x, tangent = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found, expected = (forward_ad.unpack_dual(module(dual)[0]).tangent for module in (layer, plain))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        _, found = torch.func.jvp(lambda t: layer(t)[0], (x,), (tangent,))
    torch.testing.assert_close(found, expected)


def test_an_initial_state_that_requires_grad_gives_no_warning_without_autograd(recwarn):
    layer, h = sf.GRU(3, 4, feedback="dsf"), torch.zeros(1, 2, 4, requires_grad=True)
    with torch.no_grad():
        layer(torch.zeros(5, 2, 3), h)
    assert not recwarn.list
