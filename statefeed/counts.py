"""Sizes of a call of a layer, and the flops of its matrix products."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from statefeed.stack import RecurrentStack


class Counts(NamedTuple):
    """Sizes of a call, over all layers and directions, and flops of one product of each kind."""

    steps: int
    values: int  # inputs and outputs of the layers
    gates: int  # what a cell saves besides its outputs
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
        values=rows * (of_h * count + sum(widths)),
        gates=rows * H * cell.saved_values * count,
        inputs=sum(2 * rows * width * cell.gates * H * directions for width in widths),
        hidden=2 * rows * layer._weight("weight_hh_l0").numel() * count,
        projection=2 * rows * H * of_h * count if cell.projects else 0,
    )
