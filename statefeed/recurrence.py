"""One layer in one direction: the exact forward pass, and beside it the backward pass as a scan and local gradients.

    delta[t] = e[t] + D[t+1] * delta[t+1]                            the scan
    delta_k  = scan_D(e + shift((J - D)^T delta_{k-1}))              k corrections
    dtheta   = sum_t (ds[t]/dtheta at fixed s[t-1])^T delta[t]       large products over all steps at once

An LSTM runs two scans, gamma over c being fed by delta over h of the same step. Time comes first; packed rows are laid
out as in torch's PackedSequence and become a (T, B, H) grid only for the scan, so padding enters no product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from statefeed.cells import Cell
from statefeed.feedback import Feedback
from statefeed.scan import diagonal_scan


class Calibration(NamedTuple):
    """The running mean of diag(J[t]): one row of a layer's buffers, and whether this backward updates it."""

    mean: Tensor
    updates: Tensor
    training: bool

    def observe(self, jacobian: Tensor) -> None:
        """Take in the mean of one backward pass: cumulative over the first 100, then exponential with weight 0.01."""
        self.updates.add_(1)
        weight = self.updates.to(self.mean.dtype).reciprocal().clamp(min=0.01)
        self.mean.lerp_(jacobian.to(self.mean.dtype), weight)


def recurrence(
    cell: Cell,
    feedback: Feedback,
    calibration: Calibration | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs and final state of one layer in one direction.

    Args:
        cell: from cells.py.
        feedback: the rule of the backward pass; not ``"bptt"``.
        calibration: the running mean that ``"calibrated"`` reads and updates, else None.
        x: (T, B, I), or packed rows (N, I) with ``batch_sizes``.
        batch_sizes: rows of every step, int64 on the CPU, as in PackedSequence; None if x is dense.
        state: (h,) or (h, c), each (B, H).
        weights: w_ih (G*H, I), w_hh (G*H, H) and, if there are biases, b_ih and b_hh (G*H,).

    Returns:
        y, the shape of x with H in place of I, and the final state.

    Gradient: approximate, as the rule says; exact for k >= T.

    Cost: forward, torch's own layer without autograd; backward, one scan and two products to recompute the gates of a
        GRU or LSTM, three to form the gradients, one per correction. Saved for the backward: x, y and the state.
    """
    y, *final = _Recurrence.apply(  # type: ignore[no-untyped-call]
        cell, feedback, calibration, batch_sizes, len(state), x, *state, *weights
    )
    return y, tuple(final)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        feedback: Feedback,
        calibration: Calibration | None,
        batch_sizes: Tensor | None,
        states: int,
        x: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        state, weights = rest[:states], rest[states:]
        layer = getattr(torch._VF, cell.name)
        hx: Any = [s[None] for s in state] if states > 1 else state[0][None]
        biased = len(weights) > 2
        if batch_sizes is None:
            y, *final = layer(x, hx, weights, biased, 1, 0.0, False, False, False)
        else:
            y, *final = layer(x, batch_sizes, hx, weights, biased, 1, 0.0, False, False)
        ctx.cell, ctx.feedback, ctx.calibration, ctx.states = cell, feedback, calibration, states
        ctx.autocast = _autocast(x.device.type)
        ctx.save_for_backward(batch_sizes, x, y, *rest)
        return y, *(s[0] for s in final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        batch_sizes, x, y, *rest = ctx.saved_tensors
        state, weights = tuple(rest[: ctx.states]), rest[ctx.states :]
        needs_x, needs = ctx.needs_input_grad[5], ctx.needs_input_grad[6 + ctx.states :]
        with torch.autocast(x.device.type, *ctx.autocast):
            d_input, d_hidden, h_before, d_state = _pre_activation_gradients(
                ctx.cell, ctx.feedback, ctx.calibration, batch_sizes, x, y, state, weights, grads
            )
            w_ih, w_hh = weights[:2]
            same = d_hidden is d_input
            d_input = d_input.to(w_ih.dtype)
            d_hidden = d_input if same else d_hidden.to(w_hh.dtype)
            d_x = (d_input @ w_ih).to(x.dtype) if needs_x else None
            d_weights: list[Tensor | None] = [
                (_rows(d_input).T @ _rows(x)).to(w_ih.dtype) if needs[0] else None,
                (_rows(d_hidden).T @ _rows(h_before).to(w_hh.dtype)).to(w_hh.dtype) if needs[1] else None,
            ]
            if len(weights) > 2:
                d_weights += [_rows(d_input).sum(0), _rows(d_hidden).sum(0)]
        d_state = tuple(d.to(s.dtype) for d, s in zip(d_state, state, strict=True))
        return None, None, None, None, None, d_x, *d_state, *d_weights


def _pre_activation_gradients(
    cell: Cell,
    feedback: Feedback,
    calibration: Calibration | None,
    batch_sizes: Tensor | None,
    x: Tensor,
    y: Tensor,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    grads: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """(d_input, d_hidden, h before each step, gradients of the initial state)."""
    wide = torch.float32 if y.dtype in (torch.bfloat16, torch.float16) else y.dtype
    time = _Time(batch_sizes)
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    h_before = time.before(y, state[0].to(y.dtype))

    def products() -> tuple[Tensor, Tensor]:
        return F.linear(x, w_ih, b_ih).to(wide), F.linear(h_before.to(w_hh.dtype), w_hh, b_hh).to(wide)

    def integrate(u: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        c0 = state[1].to(wide)
        c = time.rows(diagonal_scan(time.grid(u), time.grid(f), initial=c0))
        return time.before(c, c0), c

    step = cell.step(y.to(wide), products, integrate)
    h = h_before.to(wide)
    D = _diagonals(cell, feedback, calibration, step, h, w_hh.to(wide))
    direct = cell.direct(step)

    e = [time.at_end(torch.zeros_like(h), g.to(wide)) for g in grads[1:]]
    e[0] = e[0] + time.grid(grads[0].to(wide))

    def scanned(residual: list[Tensor] | None) -> tuple[Tensor, ...]:
        """The gradient of every state, h first: what c is fed includes what reaches it through h."""
        delta: tuple[Tensor, ...] = ()
        for s, fed in enumerate(e):
            if s and cell.emit is not None:
                fed = fed + time.grid(cell.emit(step, delta[0]))
            if residual is not None:
                fed = fed + time.later(time.grid(residual[s]))
            a = D[s] if D[s].dim() == 1 else time.later(time.grid(D[s]))
            delta = (*delta, time.rows(diagonal_scan(fed, a, reverse=True)))
        return delta

    residual = None
    delta = scanned(None)
    d_input, d_hidden = cell.local(step, h, delta)
    for _ in range(feedback.corrections):
        # (J - D)^T delta of the round before: the direct path less the feedback, then the dense part.
        residual = [_direct_less(p, d, g) for p, d, g in zip(direct, D, delta, strict=True)]
        residual[0] = residual[0] + (d_hidden.to(w_hh.dtype) @ w_hh).to(wide)
        delta = scanned(residual)
        d_input, d_hidden = cell.local(step, h, delta)

    d_state = [D[s] * delta[s] for s in range(len(state))]
    if residual is not None:
        d_state = [d + r for d, r in zip(d_state, residual, strict=True)]
    return d_input, d_hidden, h_before, tuple(time.first(d) for d in d_state)


def _diagonals(
    cell: Cell, feedback: Feedback, calibration: Calibration | None, step: NamedTuple, h: Tensor, w_hh: Tensor
) -> tuple[Tensor, ...]:
    """D of every state: (H,) if stationary, else one row per step."""
    states, H = 1 if cell.emit is None else 2, h.shape[-1]
    if feedback.diagonal == "gate":
        return tuple(h.new_zeros(H) if p is None else p for p in cell.direct(step))
    if feedback.diagonal == "jacobian":
        return cell.jacobian(step, h, w_hh)
    if calibration is None:
        D = feedback.stationary(states * H, h.dtype, h.device)
        assert D is not None
    else:
        if calibration.training and h.numel():
            calibration.observe(torch.cat([_rows(j).mean(0) for j in cell.jacobian(step, h, w_hh)]))
        D = calibration.mean.to(h.dtype)
    return tuple(torch.split(D, H))


def _direct_less(direct: Tensor | None, D: Tensor, delta: Tensor) -> Tensor:
    return -D * delta if direct is None else (direct - D) * delta


class _Time(NamedTuple):
    """How rows lie in time: dense (T, B, .), or packed (N, .) with ``batch_sizes`` rows a step."""

    batch_sizes: Tensor | None

    def grid(self, rows: Tensor) -> Tensor:
        """(T, B, .), zero behind the end of a sequence."""
        if self.batch_sizes is None:
            return rows
        padded: Tensor = torch._VF._pad_packed_sequence(rows, self.batch_sizes, False, 0.0, -1)[0]
        return padded

    def rows(self, grid: Tensor) -> Tensor:
        """The inverse of ``grid``."""
        if self.batch_sizes is None:
            return grid
        packed: Tensor = torch._VF._pack_padded_sequence(grid, self._lengths(), False)[0]
        return packed

    def before(self, rows: Tensor, initial: Tensor) -> Tensor:
        """The rows one step earlier, ``initial`` before the first."""
        return self.rows(torch.cat([initial[None], self.grid(rows)[:-1]]))

    def later(self, grid: Tensor) -> Tensor:
        """The grid one step later, zero behind the last."""
        return torch.cat([grid[1:], torch.zeros_like(grid[:1])])

    def first(self, rows: Tensor) -> Tensor:
        """The rows of the first step, (B, .)."""
        return rows[0] if self.batch_sizes is None else rows[: int(self.batch_sizes[0])]

    def at_end(self, rows: Tensor, final: Tensor) -> Tensor:
        """A grid of zeros with ``final`` (B, .) at the last step of every sequence."""
        grid = self.grid(rows)
        if self.batch_sizes is None:
            grid[-1] = final
        else:
            grid[self._lengths() - 1, torch.arange(len(final))] = final
        return grid

    def _lengths(self) -> Tensor:
        assert self.batch_sizes is not None
        steps = torch.arange(int(self.batch_sizes[0]))
        return (self.batch_sizes[:, None] > steps).sum(0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _autocast(device: str) -> tuple[torch.dtype, bool]:
    return torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
