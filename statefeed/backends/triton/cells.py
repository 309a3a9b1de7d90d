"""Each cell on one row of one block of units: its local gradient and its diagonals, as factors of the state's gradient.

A row multiplies the gradient of its state by k0 .. k3 to give the gradient of its pre-activations, in torch's order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def factors(
    gates, extra, state, own0, own1, own2, own3, row, unit, H, inside,
    CELL: tl.constexpr, RULE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """k0 .. k3, the direct path, what passes from h to c within the step, and the diagonal of h and of c.

    RNN    d = k0 delta
    GRU    d_r, d_z, d_n, d_q = k0 .. k3 times delta; d_q is the gradient at q = W_hn h' + b_hn
    LSTM   d_i, d_f, d_g = k0 .. k2 times gamma, d_o = k3 delta, gamma = emit delta + what comes from the next step

    Args:
        gates: rows of pre-activations, (N, G * H).
        extra: rows of the GRU's q or of the LSTM's c before the step, (N, H).
        state: rows of the RNN's y or of the GRU's h before the step, (N, H).
        own0 .. own3: the stationary diagonals of h and c, or the weights from a unit to itself, gate by gate; zero
            under "gate", where a state without a gate keeps that for its diagonal.
    """
    at = row * H + unit
    if CELL == "gru":
        gate = gates + row * (3 * H) + unit
        r = 1 / (1 + tl.exp(-tl.load(gate, inside, 0).to(WIDE)))
        z = 1 / (1 + tl.exp(-tl.load(gate + H, inside, 0).to(WIDE)))
        q = tl.load(extra + at, inside, 0).to(WIDE)
        n = 2 / (1 + tl.exp(-2 * (tl.load(gate + 2 * H, inside, 0).to(WIDE) + r * q))) - 1
        h = tl.load(state + at, inside, 0).to(WIDE)
        k1 = (h - n) * z * (1 - z)
        k2 = (1 - z) * (1 - n * n)
        k3 = k2 * r
        k0 = k3 * q * (1 - r)
        direct = z
        emit = z
        D_h = z
        if RULE == "jacobian":
            D_h = z + k0 * own0 + k1 * own1 + k3 * own2
        D_c = own1
    elif CELL == "lstm":
        gate = gates + row * (4 * H) + unit
        i = 1 / (1 + tl.exp(-tl.load(gate, inside, 0).to(WIDE)))
        f = 1 / (1 + tl.exp(-tl.load(gate + H, inside, 0).to(WIDE)))
        g = 2 / (1 + tl.exp(-2 * tl.load(gate + 2 * H, inside, 0).to(WIDE))) - 1
        o = 1 / (1 + tl.exp(-tl.load(gate + 3 * H, inside, 0).to(WIDE)))
        c = tl.load(extra + at, inside, 0).to(WIDE)
        tanh_c = 2 / (1 + tl.exp(-2 * (f * c + i * g))) - 1
        k0 = g * i * (1 - i)
        k1 = c * f * (1 - f)
        k2 = i * (1 - g * g)
        k3 = tanh_c * o * (1 - o)
        direct = f
        emit = o * (1 - tanh_c * tanh_c)
        D_h = own0
        if RULE == "jacobian":
            D_h = k3 * own3 + emit * (k0 * own0 + k1 * own1 + k2 * own2)
        D_c = f
    else:
        y = tl.load(state + at, inside, 0).to(WIDE)
        k0 = 1 - y * y
        if CELL == "rnn_relu":
            k0 = tl.where(y > 0, 1.0, 0.0).to(WIDE)
        k1 = k0
        k2 = k0
        k3 = k0
        direct = own1
        emit = k0
        D_h = k0 * own0
        D_c = own1
    if RULE == "stationary":
        D_h = own0
        D_c = own1
    return k0, k1, k2, k3, direct, emit, D_h, D_c
