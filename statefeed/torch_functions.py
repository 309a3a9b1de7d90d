"""torch's own functions for a layer called without the checks of torch.nn in Python.

The results are those of the layer in torch.nn. Its checks take 6 to 10 microseconds of a call, as long as one step of a
small layer, and its function for whole sequences takes longer for one step than the function of the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statefeed.cells.protocol import State

_LAYERS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
    "GRU": torch._VF.gru,
    "LSTM": torch._VF.lstm,
}
_CELLS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch._VF.rnn_tanh_cell,
    "RNN_RELU": torch._VF.rnn_relu_cell,
    "GRU": torch._VF.gru_cell,
    "LSTM": torch._VF.lstm_cell,
}
Weights: TypeAlias = Sequence[Sequence[Tensor]]


def sequence(
    layer: nn.RNNBase, weights: Weights, x: Tensor, state: State | None, batch_sizes: Tensor | None
) -> tuple[Tensor, State]:
    """Outputs and final state of all layers in one call.

    Args:
        layer: only its settings, such as ``dropout`` and ``training``.
        weights: of every layer, those of the forward direction, then those of the reverse direction.
        x: the input, of the shape that the layer takes as a padded batch, or packed rows (N, I).
        state: initial state, (L * directions, B, width) per part; None is zeros.
        batch_sizes: of packed rows, else None.
    """
    if state is None:
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        sequences = x.shape[0 if layer.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        zeros = x.new_zeros(rows, sequences, layer.hidden_size)
        state = (x.new_zeros(rows, sequences, layer.proj_size) if layer.proj_size else zeros, zeros)
    hx = state if layer.mode == "LSTM" else state[0]
    flat = [weight for each in weights for weight in each]
    settings = (layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional)
    if batch_sizes is None:
        y, *final = _LAYERS[layer.mode](x, hx, flat, *settings, layer.batch_first)
    else:
        y, *final = _LAYERS[layer.mode](x, batch_sizes, hx, flat, *settings)
    return y, tuple(final)


def step(layer: nn.RNNBase, weights: Weights, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Outputs and final state of one step, by the function of the cell.

    Args:
        layer: as for ``sequence``, without projections, for which there is no such function.
        weights: as for ``sequence``.
        x: (1, B, I), (B, 1, I) for a layer with batch_first, or packed rows (B, I).
        state: as for ``sequence``.

    Returns:
        Outputs in the form of x, and the final state.
    """
    time, cell, is_lstm = (1 if layer.batch_first else 0), _CELLS[layer.mode], layer.mode == "LSTM"
    packed = x.dim() == 2
    directions = 2 if layer.bidirectional else 1
    rows, final = x if packed else x.squeeze(time), []
    zeros = rows.new_zeros(len(rows), layer.hidden_size) if state is None else None
    if is_lstm and torch.is_autocast_enabled("cpu"):  # which casts the state of the layer, not of the cell
        dtype = torch.get_autocast_dtype("cpu")
        zeros = None if zeros is None else zeros.to(dtype)
        state = None if state is None else tuple(s.to(dtype) for s in state)
    for k, layer_weights in enumerate(weights):
        if k and layer.dropout and layer.training:
            rows = F.dropout(rows, layer.dropout)
        each = len(layer_weights) // directions
        done = []
        for direction in range(directions):
            own = layer_weights[direction * each : (direction + 1) * each]
            initial = [zeros, zeros] if state is None else [s[k * directions + direction] for s in state]
            done.append(cell(rows, initial, *own) if is_lstm else (cell(rows, initial[0], *own),))
        rows = done[0][0] if directions == 1 else torch.cat([h for h, *_ in done], -1)
        final += done
    # A copy of h, because a change of y in place must not change the final state.
    h, *others = zip(*final, strict=True)
    c = tuple(part[0].unsqueeze(0) if len(part) == 1 else torch.stack(part) for part in others)
    return rows if packed else rows.unsqueeze(time), (torch.stack(h), *c)
