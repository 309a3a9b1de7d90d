"""LSTM: c = f c' + i g, h = o tanh(c). Gates in torch's order i, f, g, o."""

from __future__ import annotations

import triton
import triton.language as tl

from statefeed.backends.triton.cells.activations import sigmoid, tanh
from statefeed.backends.triton.cells.cell import Cell


@triton.jit
def factors(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, mask, ACC: tl.constexpr):
    """Of one row: ``gates`` (N, 4H) pre-activations, ``saved`` (N, H) c before the step; ``state`` is not read."""
    gate = gates + row * (4 * H) + unit
    i = sigmoid(tl.load(gate, mask, 0).to(ACC))
    f = sigmoid(tl.load(gate + H, mask, 0).to(ACC))
    g = tanh(tl.load(gate + 2 * H, mask, 0).to(ACC))
    o = sigmoid(tl.load(gate + 3 * H, mask, 0).to(ACC))
    c = tl.load(saved + row * H + unit, mask, 0).to(ACC)
    tanh_c = tanh(f * c + i * g)
    k0 = g * i * (1 - i)
    k1 = c * f * (1 - f)
    k2 = i * (1 - g * g)
    k3 = tanh_c * o * (1 - o)
    dh_dc = o * (1 - tanh_c * tanh_c)
    jacobian = k3 * w3 + dh_dc * (k0 * w0 + k1 * w1 + k2 * w2)
    return (k0, k1, k2, k3), (tl.zeros_like(f), f), (dh_dc,), (jacobian, f)


@triton.jit
def local(k, delta, gamma_c, gamma_n):
    """Gradients at i, f, g, which affect c, and at o, which affects h."""
    return k[0] * gamma_c, k[1] * gamma_c, k[2] * gamma_c, k[3] * delta


@triton.jit
def cell_step(gates, a, row, unit, H, mask, STATIONARY: tl.constexpr, ACC: tl.constexpr):
    """Factor f and input i g of c = f c' + i g, as ``statefeed.scan.triton`` scans it."""
    gate = gates + row * (4 * H) + unit
    i = sigmoid(tl.load(gate, mask, 0).to(ACC))
    f = sigmoid(tl.load(gate + H, mask, 0).to(ACC))
    return f, i * tanh(tl.load(gate + 2 * H, mask, 0).to(ACC))


LSTM = Cell("lstm", 2, 4, 4, factors, local, "cell_state")
