"""Sizes of a call of a layer, the flops of its matrix products, and the bytes that it saves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from statefeed.backends import Backend
from statefeed.backends.protocol import Description
from statefeed.recurrence import autocast_dtype
from statefeed.stack import RecurrentStack


class Counts(NamedTuple):
    """Sizes of a call, over all layers and directions, and flops of one product of each kind."""

    steps: int
    rows: int
    outputs: int  # values of the outputs of all layers
    inputs_after_dropout: int  # values of inputs of later layers that are not the outputs of earlier ones
    gates: int  # values that a cell saves besides its outputs
    states: int  # values of the parts of the state besides h
    inputs: int  # flops
    hidden: int
    projection: int

    @property
    def forward(self) -> int:
        """The forward pass."""
        return self.inputs + self.hidden + self.projection

    @property
    def bptt(self) -> int:
        """The backward pass of torch.nn: a product for the gradient of each operand."""
        return 2 * self.forward


def counts_of(layer: RecurrentStack, x: Tensor | PackedSequence) -> Counts:
    """The counts of a call of a layer with weights on an input."""
    data = x.data if isinstance(x, PackedSequence) else x
    if isinstance(x, PackedSequence):
        steps = len(x.batch_sizes)
    else:
        steps = data.shape[1 if layer.batch_first and data.dim() == 3 else 0]
    cell, rows = layer.feedback_cell, data.numel() // data.shape[-1]
    directions = 2 if layer.bidirectional else 1
    H, count = layer.hidden_size, directions * layer.num_layers
    of_h = cell.state_widths(H, getattr(layer, "proj_size", 0))[0]
    widths = [layer.input_size, *[of_h * directions] * (layer.num_layers - 1)]
    return Counts(
        steps=steps,
        rows=rows,
        outputs=rows * of_h * count,
        inputs_after_dropout=rows * sum(widths[1:]) if layer.dropout and layer.training else 0,
        gates=rows * H * cell.saved_values * count,
        states=rows * sum(layer._state_widths[1:]) * count,
        inputs=sum(2 * rows * width * cell.gates * H * directions for width in widths),
        hidden=2 * rows * layer._weight("weight_hh_l0").numel() * count,
        projection=2 * rows * H * of_h * count if cell.projects else 0,
    )


def saved_bytes(
    layer: RecurrentStack, x: Tensor | PackedSequence, counts: Counts, backend: Backend, found: Description
) -> int:
    """Bytes that all layers of a call save: their inputs and outputs, and what the backend's description says.

    A layer saves its output twice where the backend computed it per direction or in another dtype.
    """
    data, cell = x.data if isinstance(x, PackedSequence) else x, layer.feedback_cell
    weight_dtype = layer._weight("weight_hh_l0").dtype
    compute_dtype = autocast_dtype(data)
    dtypes: tuple[torch.dtype, ...] = (weight_dtype,)
    if compute_dtype is not None and weight_dtype != torch.float64:  # autocast does not cast float64
        ragged = isinstance(x, PackedSequence) and bool(x.batch_sizes[-1] < x.batch_sizes[0])
        dtypes = cell.autocast_dtypes(compute_dtype, data.dtype, ragged)
    has_copies = layer.bidirectional or (backend.upcasts and set(dtypes) != {weight_dtype})
    computed = weight_dtype if backend.upcasts else dtypes[0]
    sequential = layer.forward_method == "sequential"  # another forward pass saves no states
    states = counts.states if found.saves_states and sequential else 0
    outputs = counts.outputs + counts.inputs_after_dropout
    own = states + (counts.gates if found.saves_gates else 0) + (counts.outputs if has_copies else 0)
    return counts.rows * layer.input_size * data.itemsize + outputs * dtypes[0].itemsize + own * computed.itemsize
