"""GRU cell of torch: h = (1 - z) n + z h', n = tanh(x_n + r q), q = h' W_hn^T + b_hn; gates r, z, n."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell, Scan, State, Step, w_hh_diagonal


class Saved(NamedTuple):
    r: Tensor
    z: Tensor
    n: Tensor
    candidate_hidden: Tensor  # q, the hidden part of the candidate before the reset gate
    h_prev: Tensor


def _gates(inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_r, x_z, x_n = inputs.chunk(3, -1)
    h_r, h_z, q = hidden.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return r, z, torch.tanh(x_n + r * q), q


class GRU(Cell):
    """GRU cell, h = (1 - z) n + z h'."""

    name = "gru"
    gates = 3
    shared_gates = 2
    saved_type = Saved
    saved_values = 4
    torch_forward = "gru"

    def autocast_dtype(self, compute_dtype: torch.dtype, state_dtype: torch.dtype, ragged: bool) -> torch.dtype:
        """The dtype of z h': torch does not cast h'."""
        return torch.promote_types(compute_dtype, state_dtype)

    def step(self, inputs: Tensor, hidden: Tensor, previous: State) -> State:
        _, z, n, _ = _gates(inputs, hidden)
        return ((1 - z) * n + z * previous[0],)

    def linearize(self, step: Step) -> Saved:
        return Saved(*_gates(*step.preactivations()), step.previous[0])

    def local_gradient(self, at: Saved, delta: State) -> tuple[Tensor, Tensor]:
        r, z, n, q, h_prev = at
        d_n = delta[0] * (1 - z) * (1 - n * n)
        d_z = delta[0] * (h_prev - n) * z * (1 - z)
        d_r = d_n * q * r * (1 - r)
        return torch.cat([d_r, d_z, d_n], -1), torch.cat([d_r, d_z, d_n * r], -1)

    def direct_path(self, at: Saved) -> tuple[Tensor]:
        return (at.z,)

    def jacobian_diagonal(self, at: Saved, w_hh: Tensor) -> State:
        r, z, n, q, h_prev = at
        w_r, w_z, w_n = (w_hh_diagonal(w_hh, gate) for gate in range(3))
        through_z = (h_prev - n) * z * (1 - z) * w_z
        through_n = (1 - z) * (1 - n * n) * (r * w_n + q * r * (1 - r) * w_r)
        return (z + through_z + through_n,)

    def newton_update(self, gates: Tensor, inputs: Tensor, h_prev: Tensor, w_hh: Tensor, scan: Scan) -> State:
        r, z = gates[:2].sigmoid_()
        n = torch.addcmul(inputs[0], r, gates[2]).tanh_()
        return (scan(0, z, torch.addcmul(n, z, n, value=-1)),)
