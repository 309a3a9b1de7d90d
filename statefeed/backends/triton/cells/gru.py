"""GRU: h = (1 - z) n + z h', n = tanh(x_n + r q), q = W_hn h' + b_hn. Gates in torch's order r, z, n."""

from __future__ import annotations

import triton
import triton.language as tl

from statefeed.backends.triton.cells.activations import sigmoid, tanh
from statefeed.backends.triton.cells.cell import Cell


@triton.jit
def factors(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, mask, ACC: tl.constexpr):
    """Of one row: ``gates`` (N, 3H) pre-activations, ``saved`` (N, H) q, ``state`` h before the step."""
    gate = gates + row * (3 * H) + unit
    r = sigmoid(tl.load(gate, mask, 0).to(ACC))
    z = sigmoid(tl.load(gate + H, mask, 0).to(ACC))
    q = tl.load(saved + row * H + unit, mask, 0).to(ACC)
    n = tanh(tl.load(gate + 2 * H, mask, 0).to(ACC) + r * q)
    h = tl.load(state + row * state_stride + unit, mask, 0).to(ACC)
    k1 = (h - n) * z * (1 - z)
    k2 = (1 - z) * (1 - n * n)
    k3 = k2 * r
    k0 = k3 * q * (1 - r)
    return (k0, k1, k2, k3), (z,), (), (z + k0 * w0 + k1 * w1 + k3 * w2,)


@triton.jit
def local(k, delta, gamma_c, gamma_n):
    """Gradients at r, z, at n's input part and at q."""
    return k[0] * delta, k[1] * delta, k[2] * delta, k[3] * delta


GRU = Cell("gru", 1, 3, 2, factors, local, "candidate_hidden")
