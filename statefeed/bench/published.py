"""Baseline of the benchmarks: Diagonal State Feedback by the procedure of arXiv 2503.23104, in plain torch.

The forward pass runs without autograd. One batched call of the cell on the detached previous states then provides all
local gradients through autograd. Between that call and the loss, a loop over time uses a dense feedback matrix:

    delta[t] = e[t] + delta[t+1] @ diag(D)          an S x S product per step

D = linspace(0, 1, S). An LSTM's state is the concatenation (h, c), S = 2H. The loop also includes the gradient that
reaches c[t] through h[t] of the same step, so that the result is the gradient of ``feedback="dsf"``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def published(layer: nn.RNNBase, x: Tensor) -> tuple[Tensor, Any]:
    """The outputs of the layer, with the gradient of the published procedure.

    Args:
        layer: torch.nn.RNN (tanh), GRU or LSTM, time first, one layer, one direction, with biases.
        x: inputs (T, B, I).

    Returns:
        Outputs (T, B, H) and the final state in the form of the layer; the initial state is zero.

    Gradient: that of ``feedback="dsf"``, in x and the parameters.

    Cost: T dependent products of (B, S) with (S, S) in the backward pass; autograd saves the gates of all steps.
    """
    with torch.no_grad():
        y, _ = layer(x)
    h_before = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
    w_ih, w_hh, b_ih, b_hh = layer.all_weights[0]
    input, hidden = F.linear(x, w_ih, b_ih), F.linear(h_before, w_hh, b_hh)
    H = layer.hidden_size
    if isinstance(layer, nn.LSTM):
        h, c, dh_dc = _lstm(input + hidden)
        states = _DenseFeedback.apply(torch.cat([h, c], -1), dh_dc)  # type: ignore[no-untyped-call]
        return states[..., :H], (states[-1:, :, :H], states[-1:, :, H:])
    cell = _gru(input, hidden, h_before) if isinstance(layer, nn.GRU) else torch.tanh(input + hidden)
    states = _DenseFeedback.apply(cell, None)  # type: ignore[no-untyped-call]
    return states, states[-1:]


def _gru(input: Tensor, hidden: Tensor, h_before: Tensor) -> Tensor:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = input.chunk(3, -1), hidden.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h_before


def _lstm(gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, c and dh/dc at fixed gates; torch.nn returns only the last c, so an element-wise loop computes them all."""
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    u = i * g
    with torch.no_grad():
        c_before = torch.zeros_like(u)
        for t in range(len(u) - 1):
            torch.addcmul(u[t], f[t], c_before[t], out=c_before[t + 1])
    c = f * c_before + u
    tanh_c = torch.tanh(c)
    return o * tanh_c, c, (o * (1 - tanh_c * tanh_c)).detach()


class _DenseFeedback(torch.autograd.Function):
    """The identity on all states (T, B, S), whose gradient runs the feedback loop."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, dh_dc: Tensor | None) -> Tensor:
        ctx.save_for_backward(dh_dc)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor, None]:
        (dh_dc,) = ctx.saved_tensors
        S = e.shape[-1]
        D = torch.diag(torch.linspace(0, 1, S, dtype=e.dtype, device=e.device))
        local = torch.empty_like(e)
        delta = torch.zeros_like(e[0])
        for t in reversed(range(len(e))):
            torch.addmm(e[t], delta, D, out=local[t])
            delta = local[t]
            if dh_dc is not None:
                d_h, d_c = delta.chunk(2, -1)
                delta = torch.cat([d_h, torch.addcmul(d_c, dh_dc[t], d_h)], -1)
        return local, None
