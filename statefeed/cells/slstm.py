"""sLSTM cell of xLSTM (arXiv 2405.04517): c = f c' + i z, n = f n' + i, h = o c / n; gates i, f, z, o.

c and n are stored divided by exp(m), where m follows the largest exponent, so that nothing overflows:

    log_f = logsigmoid(pre_f), or pre_f with an exponential forget gate
    m = pre_i at the first step, else max(pre_i, log_f + m')
    i = min(exp(pre_i - m), 1),   f = min(exp(log_f + m' - m), 1),   z = tanh(pre_z),   o = sigmoid(pre_o)

The first step of a unit is the one with n' = 0: afterwards n is at least 1. h does not depend on m.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed.cells.block_diagonal import BlockDiagonalCell
from statefeed.cells.protocol import Preactivations, Scan, State, Step
from statefeed.layout import Layout
from statefeed.scan import diagonal_scan


class Saved(NamedTuple):
    i: Tensor
    f: Tensor
    z: Tensor
    o: Tensor
    f_slope: Tensor  # df / dpre_f at fixed m and m'
    c: Tensor
    n: Tensor
    c_prev: Tensor
    n_prev: Tensor


class _SLSTM(BlockDiagonalCell):
    gates = 4
    shared_gates = 4
    states = ("h", "c", "n", "m")
    constant_states = ("m",)
    saved_type = Saved
    saved_values = 7  # i, f, z, o, c, n, and the slope of log_forget

    @abstractmethod
    def log_forget(self, pre_f: Tensor) -> Tensor:
        """The logarithm of the forget gate before stabilization."""

    @abstractmethod
    def log_forget_slope(self, pre_f: Tensor) -> Tensor | float:
        """The derivative of ``log_forget``."""

    def autocast_dtype(self, compute_dtype: torch.dtype, state_dtype: torch.dtype, ragged: bool) -> torch.dtype:
        """float32: m is a logarithm, so that its rounding error is a factor of c and n."""
        return torch.promote_types(compute_dtype, torch.float32)

    def step(self, inputs: Tensor, hidden: Tensor, previous: State) -> State:
        _, c, n, m_prev = previous
        pre = inputs.to(m_prev.dtype) + hidden.to(m_prev.dtype)
        pre_i, pre_f, _, _ = pre.chunk(4, -1)
        m = torch.where(n == 0, pre_i, torch.maximum(pre_i, self.log_forget(pre_f) + m_prev))
        i, f, z, o = self._gates(pre, m_prev, m, n == 0)
        c, n = f * c + i * z, f * n + i
        return o * c / n, c, n, m

    def linearize(self, step: Step) -> Saved:
        inputs, hidden = step.preactivations()
        pre, m = inputs + hidden, step.after[3]
        i, f, z, o = self._gates(pre, step.previous[3], m, step.previous[2] == 0)
        f_slope = f * self.log_forget_slope(pre.chunk(4, -1)[1])
        return Saved(i, f, z, o, f_slope, *step.after[1:3], *step.previous[1:3])

    def _gates(self, pre: Tensor, m_prev: Tensor, m: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pre_i, pre_f, pre_z, pre_o = pre.chunk(4, -1)
        i = torch.exp(pre_i - m).clamp(max=1)
        # Only a first step exceeds 1 by more than rounding, whose errors cancel over time unless they are clamped.
        log_f = self.log_forget(pre_f) + m_prev - m
        f = torch.exp(torch.where(first, log_f.clamp(max=0), log_f))
        return i, f, torch.tanh(pre_z), torch.sigmoid(pre_o)

    def recover_states(self, preactivations: Preactivations, initial: State, layout: Layout) -> State:
        """Compute m after every step by a scan in (max, +), then c and n by linear scans over the forget gates."""
        inputs, hidden = preactivations()

        def scan(part: int, a: Tensor | None, b: Tensor) -> Tensor:
            return b if a is None else diagonal_scan(b, a, initial=initial[part])

        _, *states = self._solve(layout.grid(inputs + hidden), initial[2], initial[3], scan)
        return tuple(layout.rows(part) for part in states)

    def newton_update(self, gates: Tensor, inputs: Tensor, h_prev: Tensor, w_hh: Tensor, scan: Scan) -> State:
        """Solve m, c and n, which do not depend on each other's gradient at fixed gates, then compute h from them."""
        one = torch.ones_like(h_prev[:1])
        n, m = (scan(part, one, torch.zeros_like(one))[0] for part in (2, 3))
        return self._solve(gates.movedim(0, -2).flatten(-2), n, m, scan)

    def _solve(self, pre: Tensor, n: Tensor, m: Tensor, scan: Scan) -> State:
        """The states after all steps from preactivations (T, B, 4H) and the initial n and m."""
        pre_i, pre_f, _, _ = pre.chunk(4, -1)
        log_f = self.log_forget(pre_f)
        first = torch.zeros_like(pre_i, dtype=torch.bool)
        first[0] = n == 0
        after = pre_i.clone()
        after[0] = torch.where(n == 0, pre_i[0], torch.maximum(pre_i[0], log_f[0] + m))
        after = _max_plus_scan(after, log_f)
        i, f, z, o = self._gates(pre, torch.cat([m[None], after[:-1]]), after, first)
        c, n = scan(1, f, i * z), scan(2, f, i)
        return scan(0, None, o * c / n), c, n, after

    def local_gradient(self, at: Saved, delta: State) -> tuple[Tensor, Tensor]:
        delta_h, gamma_c, gamma_n = delta
        d_i = at.i * (at.z * gamma_c + gamma_n)
        d_f = at.f_slope * (at.c_prev * gamma_c + at.n_prev * gamma_n)
        d_z = at.i * (1 - at.z * at.z) * gamma_c
        d_o = at.c / at.n * at.o * (1 - at.o) * delta_h
        d = torch.cat([d_i, d_f, d_z, d_o], -1)
        return d, d

    def same_step(self, at: Saved, grad_h: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of c and n through h of the same step."""
        grad_c = at.o / at.n * grad_h
        return grad_c, -at.c / at.n * grad_c

    def direct_path(self, at: Saved) -> tuple[None, Tensor, Tensor]:
        return None, at.f, at.f

    def jacobian_diagonal(self, at: Saved, w_hh: Tensor) -> State:
        """dh/dh' at fixed c' and n', and dc/dc' = dn/dn' = f at fixed h'."""
        w_i, w_f, w_z, w_o = self.diagonals(w_hh)
        mean = at.c / at.n  # the average of z that h is a gate of
        through_i = at.i * (at.z - mean) * w_i
        through_f = at.f_slope * (at.c_prev - mean * at.n_prev) * w_f
        through_z = at.i * (1 - at.z * at.z) * w_z
        d_h = at.o / at.n * (through_i + through_f + through_z) + mean * at.o * (1 - at.o) * w_o
        return d_h, at.f, at.f


def _max_plus_scan(x: Tensor, a: Tensor) -> Tensor:
    """y[t] = max(x[t], a[t] + y[t-1]) over time, y[0] = x[0]: log2(T) steps of twice the distance each."""
    distance = 1
    while distance < len(x):
        x = torch.cat([x[:distance], torch.maximum(x[distance:], a[distance:] + x[:-distance])])
        a = torch.cat([a[:distance], a[distance:] + a[:-distance]])
        distance *= 2
    return x


class SLSTM(_SLSTM):
    """sLSTM cell with a sigmoid forget gate."""

    name = "slstm"

    def log_forget(self, pre_f: Tensor) -> Tensor:
        return F.logsigmoid(pre_f)

    def log_forget_slope(self, pre_f: Tensor) -> Tensor:
        return torch.sigmoid(-pre_f)


class SLSTMExp(_SLSTM):
    """sLSTM cell with an exponential forget gate."""

    name = "slstm_exp"
    saved_values = 6  # without the slope of log_forget

    def log_forget(self, pre_f: Tensor) -> Tensor:
        return pre_f

    def log_forget_slope(self, pre_f: Tensor) -> float:
        return 1.0
