"""Errors of layers and rules: one sentence that is true, where the user can act on it."""

import pytest
import torch
from torch import nn

import statefeed as sf

LAYERS = [lambda: sf.GRU(3, 4), lambda: sf.SLSTM(3, 4), lambda: sf.Recurrent(nn.GRUCell(3, 4))]


@pytest.mark.parametrize("make", LAYERS)
def test_a_parameter_is_a_fixed_diagonal_and_a_module_is_no_rule(make):
    layer = make()
    width = 12 if isinstance(layer, sf.SLSTM) else 4
    layer.feedback = nn.Parameter(torch.full((width,), 0.5))
    assert layer.feedback == sf.Feedback(torch.full((width,), 0.5))
    parameters, modules = len(list(layer.parameters())), len(list(layer.modules()))
    with pytest.raises(TypeError, match=r"^feedback must be .*, got Linear$"):
        layer.feedback = nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"^forward_method must be .*, got Linear"):
        layer.forward_method = nn.Linear(2, 3)
    assert (len(list(layer.parameters())), len(list(layer.modules()))) == (parameters, modules)
