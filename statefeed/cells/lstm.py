"""LSTM cell of torch: c = f c' + i g, h = o tanh(c); gates i, f, g, o."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell, Preactivations, Scan, State, Step, w_hh_diagonal
from statefeed.layout import Layout
from statefeed.scan import diagonal_scan


class Saved(NamedTuple):
    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c_prev: Tensor
    tanh_c: Tensor


def _gates(inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    i, f, g, o = (inputs + hidden).chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


class LSTM(Cell):
    """LSTM cell, c = f c' + i g, h = o tanh(c)."""

    name = "lstm"
    gates = 4
    shared_gates = 4
    states = ("h", "c")
    saved_type = Saved
    saved_values = 5
    torch_forward = "lstm"

    def autocast_dtype(self, compute_dtype: torch.dtype, state_dtype: torch.dtype, ragged: bool) -> torch.dtype:
        """The dtype of f c' if ragged, as torch does not cast c'; other batches run through oneDNN in compute_dtype."""
        return torch.promote_types(compute_dtype, state_dtype) if ragged else compute_dtype

    def step(self, inputs: Tensor, hidden: Tensor, previous: State) -> State:
        i, f, g, o = _gates(inputs, hidden)
        c = f * previous[1] + i * g
        return o * torch.tanh(c), c

    def linearize(self, step: Step) -> Saved:
        return Saved(*_gates(*step.preactivations()), step.previous[1], torch.tanh(step.after[1]))

    def recover_states(self, preactivations: Preactivations, initial: State, layout: Layout) -> State:
        """Compute c after every step by one linear scan over the forget gates."""
        i, f, g, _ = _gates(*preactivations())
        return (layout.rows(diagonal_scan(layout.grid(i * g), layout.grid(f), initial=initial[1])),)

    def local_gradient(self, at: Saved, delta: State) -> tuple[Tensor, Tensor]:
        i, f, g, o, c_prev, tanh_c = at
        d_h, gamma = delta
        d_i = gamma * g * i * (1 - i)
        d_f = gamma * c_prev * f * (1 - f)
        d_g = gamma * i * (1 - g * g)
        d_o = d_h * tanh_c * o * (1 - o)
        d = torch.cat([d_i, d_f, d_g, d_o], -1)
        return d, d

    def same_step(self, at: Saved, grad_h: Tensor) -> tuple[Tensor]:
        """The gradient of c through h of the same step: dh/dc at fixed gates, times the gradient of h."""
        return (at.o * (1 - at.tanh_c * at.tanh_c) * grad_h,)

    def direct_path(self, at: Saved) -> tuple[None, Tensor]:
        return None, at.f

    def jacobian_diagonal(self, at: Saved, w_hh: Tensor) -> State:
        """dh/dh' at fixed c', and dc/dc' at fixed h', which is f."""
        i, f, g, o, c_prev, tanh_c = at
        w_i, w_f, w_g, w_o = (w_hh_diagonal(w_hh, gate) for gate in range(4))
        through_c = g * i * (1 - i) * w_i + c_prev * f * (1 - f) * w_f + i * (1 - g * g) * w_g
        return tanh_c * o * (1 - o) * w_o + o * (1 - tanh_c * tanh_c) * through_c, f

    def newton_update(self, gates: Tensor, inputs: Tensor, h_prev: Tensor, w_hh: Tensor, scan: Scan) -> State:
        """Solve c, which is linear over time at fixed gates, then compute h from c."""
        i, f = gates[:2].sigmoid_()
        c = scan(1, f, i.mul_(gates[2].tanh_()))
        return scan(0, None, torch.tanh(c).mul_(gates[3].sigmoid_())), c
