"""RNN cells of torch: h = act(inputs + hidden), act = tanh or relu."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell, State, Step, w_hh_diagonal


class Saved(NamedTuple):
    slope: Tensor  # act'(inputs + hidden), a function of h alone


class _RNN(Cell):
    gates = 1
    shared_gates = 1
    saved_type = Saved
    has_direct_path = False

    def local_gradient(self, at: Saved, delta: State) -> tuple[Tensor, Tensor]:
        d = delta[0] * at.slope
        return d, d

    def direct_path(self, at: Saved) -> tuple[None]:
        return (None,)

    def jacobian_diagonal(self, at: Saved, w_hh: Tensor) -> State:
        return (at.slope * w_hh_diagonal(w_hh, 0),)


class RNNTanh(_RNN):
    """RNN cell with tanh, h = tanh(x W_ih^T + b_ih + h' W_hh^T + b_hh)."""

    name = "rnn_tanh"
    torch_forward = "rnn_tanh"

    def step(self, inputs: Tensor, hidden: Tensor, previous: State) -> State:
        return (torch.tanh(inputs + hidden),)

    def linearize(self, step: Step) -> Saved:
        h = step.after[0]
        return Saved(1 - h * h)


class RNNRelu(_RNN):
    """RNN cell with ReLU, h = relu(x W_ih^T + b_ih + h' W_hh^T + b_hh)."""

    name = "rnn_relu"
    torch_forward = "rnn_relu"

    def step(self, inputs: Tensor, hidden: Tensor, previous: State) -> State:
        return (torch.relu(inputs + hidden),)

    def linearize(self, step: Step) -> Saved:
        h = step.after[0]
        return Saved((h > 0).to(h.dtype))
