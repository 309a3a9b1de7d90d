"""Cells whose step is split into the part that depends on the input alone and the part that depends on the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statefeed.transforms import is_expanded


class SplitCell(NamedTuple):
    """The two parts of a cell, ``cell(x, state) = step(cell, project_input(cell, x), state)``."""

    project_input: Callable[[Any, Tensor], Tensor]
    step: Callable[[Any, Tensor, Any], Any]


def split_cell(cell: nn.Module) -> SplitCell | None:
    """The two parts of a cell.

    Args:
        cell: a cell with the methods ``project_input(x)`` and ``step(inputs, state)``, or torch's RNNCell, GRUCell or
            LSTMCell.

    Returns:
        The parts; None if the cell must be called as a whole: it is another one, has hooks on its forward pass, its
        ``forward`` was replaced on the object, or its weights are ExpandedWeights, which need the size of the batch.
    """
    if "forward" in cell.__dict__ or cell._forward_hooks or cell._forward_pre_hooks:
        return None
    if any(is_expanded(p) for p in cell.parameters()):
        return None
    if callable(getattr(cell, "project_input", None)) and callable(getattr(cell, "step", None)):
        return _METHODS
    return _TORCH_CELLS.get(type(cell))  # not a subclass, whose forward may be another one


def _project_by_method(cell: Any, x: Tensor) -> Tensor:
    inputs: Tensor = cell.project_input(x)
    return inputs


def _step_by_method(cell: Any, inputs: Tensor, state: Any) -> Any:
    return cell.step(inputs, state)


def _project_with_one_bias(cell: nn.RNNCellBase, x: Tensor) -> Tensor:
    return F.linear(x, cell.weight_ih, cell.bias_ih + cell.bias_hh if cell.bias else None)


def _rnn_step(cell: nn.RNNCell, inputs: Tensor, h: Tensor) -> Tensor:
    preactivations = torch.addmm(inputs, h, cell.weight_hh.t())
    return torch.tanh(preactivations) if cell.nonlinearity == "tanh" else torch.relu(preactivations)


def _lstm_step(cell: nn.LSTMCell, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = torch.addmm(inputs, h, cell.weight_hh.t()).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # promotes under autocast, as addcmul does not
    return torch.sigmoid(o) * torch.tanh(c), c


def _project_gru(cell: nn.GRUCell, x: Tensor) -> Tensor:
    return F.linear(x, cell.weight_ih, cell.bias_ih)


def _gru_step(cell: nn.GRUCell, inputs: Tensor, h: Tensor) -> Tensor:
    hidden = F.linear(h, cell.weight_hh, cell.bias_hh)
    x_r, x_z, x_n = inputs.chunk(3, -1)
    h_r, h_z, h_n = hidden.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(torch.addcmul(x_n, r, h_n))
    # Under autocast the state may have another dtype, which lerp does not take.
    return torch.lerp(n, h, z) if n.dtype == h.dtype else n + z * (h - n)


_METHODS = SplitCell(_project_by_method, _step_by_method)
_TORCH_CELLS: dict[type[nn.Module], SplitCell] = {
    nn.RNNCell: SplitCell(_project_with_one_bias, _rnn_step),
    nn.GRUCell: SplitCell(_project_gru, _gru_step),
    nn.LSTMCell: SplitCell(_project_with_one_bias, _lstm_step),
}
