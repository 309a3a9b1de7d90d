"""RNN cells of torch: h = act(inputs + hidden), act = tanh or relu."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell, Scan, State, Step, w_hh_diagonal


class Saved(NamedTuple):
    slope: Tensor  # act'(inputs + hidden), a function of h alone


class _RNN(Cell):
    gates = 1
    shared_gates = 1
    saved_type = Saved
    has_direct_path = False

    @abstractmethod
    def activation(self, x: Tensor) -> Tensor:
        """The activation function act, element-wise."""

    def step(self, inputs: Tensor, hidden: Tensor, previous: State) -> State:
        return (self.activation(inputs + hidden),)

    def local_gradient(self, at: Saved, delta: State) -> tuple[Tensor, Tensor]:
        d = delta[0] * at.slope
        return d, d

    def direct_path(self, at: Saved) -> tuple[None]:
        return (None,)

    def jacobian_diagonal(self, at: Saved, w_hh: Tensor) -> State:
        return (at.slope * w_hh_diagonal(w_hh, 0),)

    def newton_update(self, gates: Tensor, inputs: Tensor, h_prev: Tensor, w_hh: Tensor, scan: Scan) -> State:
        h = self.activation(gates[0])
        slope = self.linearize(Step((h_prev,), (h,), lambda: (h, h))).slope
        a = slope.mul_(w_hh_diagonal(w_hh, 0).clamp(-1, 1))
        return (scan(0, a, torch.addcmul(h, a, h_prev, value=-1)),)


class RNNTanh(_RNN):
    """RNN cell with tanh, h = tanh(x W_ih^T + b_ih + h' W_hh^T + b_hh)."""

    name = "rnn_tanh"
    torch_forward = "rnn_tanh"

    def activation(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def linearize(self, step: Step) -> Saved:
        h = step.after[0]
        return Saved(1 - h * h)


class RNNRelu(_RNN):
    """RNN cell with ReLU, h = relu(x W_ih^T + b_ih + h' W_hh^T + b_hh)."""

    name = "rnn_relu"
    torch_forward = "rnn_relu"

    def activation(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def linearize(self, step: Step) -> Saved:
        h = step.after[0]
        return Saved((h > 0).to(h.dtype))
