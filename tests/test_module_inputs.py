"""The inputs of torch's own module tests of nn.RNN, nn.GRU and nn.LSTM, with projections too."""

import importlib.util
import itertools
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_same
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import statefeed as sf

if importlib.util.find_spec("expecttest") is None:
    # torch's test utilities derive their TestCase from this package's; the inputs do not use it.
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

with pytest.MonkeyPatch.context() as patch:
    # The import forbids to set flags such as torch.backends.cudnn.allow_tf32, which other tests do.
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    common_modules = pytest.importorskip("torch.testing._internal.common_modules")

# The inputs have initial states that require grad.
pytestmark = pytest.mark.filterwarnings("ignore:the initial state")

OURS = {nn.RNN: sf.RNN, nn.GRU: sf.GRU, nn.LSTM: sf.LSTM}
EXACT = {torch.float64: 1e-11, torch.float32: 1e-5}


def inputs(dtype: torch.dtype, training: bool) -> Iterator[tuple[type[nn.RNNBase], Any]]:
    """The layer's class, and one of torch's inputs for it."""
    for info in common_modules.module_db:
        if info.module_cls in OURS:
            torch.manual_seed(0)
            for one in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
                yield info.module_cls, one


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for part in value for t in tensors(part)]


def results(layer: nn.RNNBase, call: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of parameters, input and initial state."""
    outputs = tensors(layer(*call.args, **call.kwargs))
    leaves = dict(layer.named_parameters())
    leaves |= {f"argument {n}": t for n, t in enumerate(tensors(call.args)) if t.is_leaf}
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip("yhc", outputs, strict=False)), dict(zip(leaves, gradients, strict=True))


def test_torch_has_projected_inputs() -> None:
    found = [one.constructor_input.kwargs for _, one in inputs(torch.float64, True)]
    assert sum(bool(arguments.get("proj_size")) for arguments in found) >= 16
    assert len(found) >= 80


@pytest.mark.parametrize("rule", ["bptt", "torch", "dsf"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_module_input_of_torch(dtype: torch.dtype, training: bool, rule: str) -> None:
    for kind, one in inputs(dtype, training):
        arguments = one.constructor_input
        theirs = kind(*arguments.args, **arguments.kwargs, dtype=dtype).train(training)
        ours = OURS[kind](*arguments.args, **arguments.kwargs, dtype=dtype, feedback=rule).train(training)
        ours.load_state_dict(theirs.state_dict())
        (outputs, gradients), (expected, exact) = (results(m, one.forward_input) for m in (ours, theirs))
        assert_same(outputs, expected, EXACT[dtype])
        if rule == "dsf":
            assert all(g.isfinite().all() for g in gradients.values())
        else:
            assert_same(gradients, exact, EXACT[dtype])
        if one.reference_fn is not None and not isinstance(one.forward_input.args[0], PackedSequence):
            call = one.forward_input
            reference = one.reference_fn(ours, *call.args, **call.kwargs)
            for y, z in itertools.zip_longest(outputs.values(), tensors(reference)):
                torch.testing.assert_close(y, z)


def test_a_planted_error_is_found() -> None:
    """The comparison sees a layer whose projection is another one."""
    kind, one = next((k, i) for k, i in inputs(torch.float64, True) if i.constructor_input.kwargs.get("proj_size"))
    theirs = kind(**one.constructor_input.kwargs, dtype=torch.float64)
    ours = sf.LSTM(**one.constructor_input.kwargs, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        ours.weight_hr_l0.copy_(ours.weight_hr_l0.flip(0))
    with pytest.raises(AssertionError):
        assert_same(results(ours, one.forward_input)[1], results(theirs, one.forward_input)[1], 1e-3)
