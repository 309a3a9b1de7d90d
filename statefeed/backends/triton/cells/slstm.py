"""sLSTM: c = f c' + i z, n = f n' + i, h = o c / n. Gates i, f, z, o; c and n are stored divided by exp(m)."""

from __future__ import annotations

import triton
import triton.language as tl

from statefeed.backends.triton.cells.activations import log_sigmoid, sigmoid, tanh
from statefeed.backends.triton.cells.cell import Cell


@triton.jit
def sigmoid_factors(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, mask, ACC: tl.constexpr):
    """Of one row, with a sigmoid forget gate; ``state`` is not read.

    ``gates`` (N, 4H) are pre-activations, ``saved`` (N, 4H) c, n and m before the step and m after it.
    """
    pre_f = tl.load(gates + row * (4 * H) + H + unit, mask, 0).to(ACC)
    return _factors(gates, saved, log_sigmoid(pre_f), sigmoid(-pre_f), w0, w1, w2, w3, row, unit, H, mask, ACC)


@triton.jit
def exponential_factors(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, mask, ACC: tl.constexpr):
    """As ``sigmoid_factors``, with an exponential forget gate."""
    pre_f = tl.load(gates + row * (4 * H) + H + unit, mask, 0).to(ACC)
    return _factors(gates, saved, pre_f, tl.zeros_like(pre_f) + 1, w0, w1, w2, w3, row, unit, H, mask, ACC)


@triton.jit
def _factors(gates, saved, log_f, slope, w0, w1, w2, w3, row, unit, H, mask, ACC: tl.constexpr):
    """``log_f`` is the logarithm of the forget gate before stabilization, ``slope`` its derivative."""
    gate = gates + row * (4 * H) + unit
    before = saved + row * (4 * H) + unit
    c_prev = tl.load(before, mask, 0).to(ACC)
    n_prev = tl.load(before + H, mask, 0).to(ACC)
    m = tl.load(before + 3 * H, mask, 0).to(ACC)
    i = tl.exp(tl.minimum(tl.load(gate, mask, 0).to(ACC) - m, 0))
    log_f += tl.load(before + 2 * H, mask, 0).to(ACC) - m
    # Only a first step exceeds 1 by more than rounding, whose errors cancel over time unless they are clamped.
    f = tl.exp(tl.where(n_prev == 0, tl.minimum(log_f, 0), log_f))
    z = tanh(tl.load(gate + 2 * H, mask, 0).to(ACC))
    o = sigmoid(tl.load(gate + 3 * H, mask, 0).to(ACC))
    n = f * n_prev + i
    mean = (f * c_prev + i * z) / n
    dh_dc = o / n
    f_slope = f * slope
    k_z = i * (1 - z * z)
    k_o = mean * o * (1 - o)
    through_c = i * (z - mean) * w0 + f_slope * (c_prev - mean * n_prev) * w1 + k_z * w2
    k = (i * z, i, f_slope * c_prev, f_slope * n_prev, k_z, k_o)
    return k, (tl.zeros_like(f), f, f), (dh_dc, -mean * dh_dc), (dh_dc * through_c + k_o * w3, f, f)


@triton.jit
def local(k, delta, gamma_c, gamma_n):
    """Gradients at i and f, which affect c and n, at z, which affects c, and at o, which affects h."""
    return k[0] * gamma_c + k[1] * gamma_n, k[2] * gamma_c + k[3] * gamma_n, k[4] * gamma_c, k[5] * delta


SLSTM = Cell("slstm", 3, 4, 4, sigmoid_factors, local, "states")
SLSTM_EXP = Cell("slstm_exp", 3, 4, 4, exponential_factors, local, "states")
