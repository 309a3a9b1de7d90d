"""LSTM cell of torch with a projected output: c = f c' + i g, h = W_hr (o tanh(c)); gates i, f, g, o."""

from __future__ import annotations

import torch
from torch import Tensor

from statefeed.cells.lstm import LSTM, Saved
from statefeed.cells.protocol import State


class LSTMProjected(LSTM):
    """LSTM cell with projections (arXiv 1402.1128), u = o tanh(c), h = W_hr u of width P, c of width H."""

    name = "lstm_projected"
    projects = True

    def autocast_dtypes(
        self, compute_dtype: torch.dtype, state_dtype: torch.dtype, ragged: bool
    ) -> tuple[torch.dtype, ...]:
        """h is the result of a product; torch does not cast c', and oneDNN does not run this cell."""
        return compute_dtype, torch.promote_types(compute_dtype, state_dtype)

    def unprojected(self, at: Saved) -> Tensor:
        return at.o * at.tanh_c

    def jacobian_diagonal(self, at: Saved, w_hh: Tensor) -> State:
        """dh/dh' at fixed c', ``sum_gj du_j/dpre_gj W_hr[p, j] W_hh[gj, p]``, and dc/dc' at fixed h', which is f.

        Cost: one product (N, H) x (H, P) per gate.
        """
        ones = torch.ones_like(at.o)
        through_gates, _ = self.local_gradient(at, (ones, *self.same_step(at, ones)))
        return through_gates @ w_hh, at.f
