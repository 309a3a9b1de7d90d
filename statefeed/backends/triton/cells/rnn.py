"""RNN: h = act(a), act tanh or relu; the slope of both is a function of h."""

from __future__ import annotations

import triton
import triton.language as tl

from statefeed.backends.triton.cells.cell import Cell


@triton.jit
def tanh_factors(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, mask, ACC: tl.constexpr):
    """Of one row: ``state`` is h after the step; ``gates`` and ``saved`` are not read."""
    h = tl.load(state + row * state_stride + unit, mask, 0).to(ACC)
    slope = 1 - h * h
    return (slope,), (tl.zeros_like(h),), (), (slope * w0,)


@triton.jit
def relu_factors(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, mask, ACC: tl.constexpr):
    """As ``tanh_factors``."""
    h = tl.load(state + row * state_stride + unit, mask, 0).to(ACC)
    slope = tl.where(h > 0, 1.0, 0.0).to(ACC)
    return (slope,), (tl.zeros_like(slope),), (), (slope * w0,)


@triton.jit
def local(k, delta, gamma_c, gamma_n):
    """The gradient at a, four times; only the first is stored."""
    d = k[0] * delta
    return d, d, d, d


RNN_TANH = Cell("rnn_tanh", 1, 1, 1, tanh_factors, local)
RNN_RELU = Cell("rnn_relu", 1, 1, 1, relu_factors, local)
