"""The operators of one layer in one direction: gates recomputed, mean Jacobian, and the backward pass of a rule.

    d      = local gradients of delta[t] = e[t] + D[t+1] * delta[t+1]      one reverse pass, two where time is in chunks
    dx     = d_input W_ih,   dW_ih = d_input^T x,   dW_hh = d_hidden^T h'  torch's products over all rows

The forward pass stores nothing but its results; the gates are recomputed in one batched product and overwritten by
their gradients. Whatever the dtype of the rows, sums run in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.backends.triton import reverse as kernels
from statefeed.backends.triton.cells import CELLS
from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.cells.lstm import cell_step
from statefeed.backends.triton.gather import Columns, columns, gather
from statefeed.backends.triton.precision import matmul_precision
from statefeed.scan import chunks
from statefeed.scan.triton import device_of, solve

# Weights side by side save passes over the rows, and cost four over the weights: not where there are few rows.
_FUSE_ROWS = 4


class Sizes(NamedTuple):
    """T steps, B rows of the first, N rows in all, I features, H units."""

    T: int
    B: int
    N: int
    I: int
    H: int

    @property
    def fused(self) -> bool:
        """Whether x and h are multiplied by the weights at once."""
        return self.N >= _FUSE_ROWS * self.H


def _sizes(x: Tensor, state: Tensor, offsets: Tensor | None) -> Sizes:
    B, H = state.shape
    T = len(x) if offsets is None else len(offsets) - 1
    return Sizes(T, B, T * B if offsets is None else len(x), x.shape[-1], H)


def rows(tensor: Tensor) -> Tensor:
    """(N, H) with adjacent units; a view unless the strides forbid it, as of one direction's half of y."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _columns(cell: Cell, size: Sizes, dtype: torch.dtype) -> Columns:
    return columns(size.I if cell.gates > 1 else 0, size.H, dtype)


# Gates recomputed -----------------------------------------------------------------------------------------------------


def _recompute(
    cell: str,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    offsets: Tensor | None,
    reverse: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    this, size, outputs = CELLS[cell], _sizes(x, state[0], offsets), rows(y)
    where = _columns(this, size, y.dtype)
    with device_of(y):
        inputs = gather(x if where.I else None, outputs, state[0], offsets, reverse, where)
        if this.gates == 1:
            return inputs, y.new_empty(0), y.new_empty(0)
        with matmul_precision(precision):
            gates, saved = _preactivations(this, size, where, inputs, [w.to(y.dtype) for w in weights])
        if this.saved == "cell_state":
            dtype = torch.promote_types(y.dtype, torch.float32)
            saved = torch.empty((size.N, size.H), dtype=dtype, device=y.device)
            if saved.numel():
                initial, sizes = state[1].to(dtype).contiguous(), (size.T, size.B, size.H)
                solve(cell_step, gates, None, initial, offsets, saved, sizes, reverse, False, True)
    return inputs, gates, saved


def _preactivations(
    cell: Cell, size: Sizes, where: Columns, inputs: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """(N, G * H), and the hidden part of a separate candidate, (N, H)."""
    w_ih, w_hh, *biases = weights
    x, h = where.x(inputs), where.h(inputs)
    shared = (cell.gates - cell.separate_candidate) * size.H
    b_sum = biases[0][:shared] + biases[1][:shared] if biases else None
    gates = inputs.new_empty((size.N, cell.gates * size.H))
    first = gates[:, :shared]
    if size.fused:
        _linear(inputs, _side_by_side(w_ih[:shared], w_hh[:shared], where), b_sum, first)
    else:
        _linear(x, w_ih[:shared], b_sum, first)
        first.addmm_(h, w_hh[:shared].T)
    if not cell.separate_candidate:
        return gates, gates
    _linear(x, w_ih[shared:], biases[0][shared:] if biases else None, gates[:, shared:])
    candidate = inputs.new_empty((size.N, size.H))
    _linear(h, w_hh[shared:], biases[1][shared:] if biases else None, candidate)
    return gates, candidate


def _linear(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    if b is None:
        torch.mm(x, w.T, out=out)
    else:
        torch.addmm(b, x, w.T, out=out)


def _side_by_side(w_ih: Tensor, w_hh: Tensor, where: Columns) -> Tensor:
    """[w_ih, w_hh] in the columns of the gathered inputs."""
    if where.start == where.I and where.width == where.start + where.H:
        return torch.cat([w_ih, w_hh], 1)
    joined = w_ih.new_zeros((len(w_ih), where.width))
    where.x(joined).copy_(w_ih)
    where.h(joined).copy_(w_hh)
    return joined


# Mean Jacobian --------------------------------------------------------------------------------------------------------


def _mean_jacobian(
    cell: str, inputs: Tensor, gates: Tensor, saved: Tensor, y: Tensor, w_hh: Tensor, B: int, offsets: Tensor | None
) -> Tensor:
    this, H, N = CELLS[cell], y.shape[-1], len(inputs)
    dtype = torch.promote_types(y.dtype, torch.float32)
    state = rows(y) if this.gates == 1 else inputs[:, inputs.shape[1] - _padded(H, y.dtype) :]
    T = len(y) if offsets is None else len(offsets) - 1
    with device_of(y):
        lanes, length, grid = chunks.launch(T, B * H, y)
        sums = torch.empty((grid[1] * B, this.states * H), dtype=dtype, device=y.device)
        kernels.add_jacobians[grid](
            gates, saved, state, state.stride(0), w_hh.to(y.dtype).contiguous(), offsets, sums, T, B, H, length,
            **this.constants, PAIRS=chunks.pairs(H, state), ACC=chunks.accumulator(dtype), LANES=lanes,
        )  # fmt: skip
        return sums.sum(0) / N


def _padded(H: int, dtype: torch.dtype) -> int:
    return columns(0, H, dtype).width


# Backward -------------------------------------------------------------------------------------------------------------


def _backward(
    cell: str,
    rule: str,
    inputs: Tensor,
    gates: Tensor,
    saved: Tensor,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    diagonal: Tensor | None,
    offsets: Tensor | None,
    corrections: int,
    reverse: bool,
    needs_x: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    this, size = CELLS[cell], _sizes(x, state[0], offsets)
    H, where = size.H, _columns(this, size, y.dtype)
    w_ih, w_hh = (w.to(y.dtype) for w in weights[:2])
    h = where.h(inputs)
    with device_of(y), matmul_precision(precision):
        d, d_candidate = (gates, saved if this.separate_candidate else None) if this.gates > 1 else (None, None)
        if corrections or d is None:
            d = inputs.new_empty((size.N, this.gates * H))
            d_candidate = None if d_candidate is None else torch.empty_like(d_candidate)
        launch = _Reverse(this, rule, size, offsets, reverse, gates, saved, rows(y) if this.gates == 1 else h)
        initial = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in state]
        fixed = (w_hh, diagonal, None if grads[0] is None else rows(grads[0]), grads[1:], initial)

        # d_hidden part by part, and the rows of W_hh that each belongs to.
        shared = (this.gates - this.separate_candidate) * H
        hidden = [(d if d_candidate is None else d[:, :shared], w_hh[:shared])]
        if d_candidate is not None:
            hidden.append((d_candidate, w_hh[shared:]))
        residual = launch.accumulator((size.N, this.states * H)) if corrections else d[:0]
        into = residual[:, :H]
        for k in range(corrections):
            launch(*fixed, residual if k else None, residual, d, d_candidate, None)
            for part, w in hidden:
                if into.dtype == part.dtype:
                    into.addmm_(part, w)
                else:
                    into += part @ w
        sums = launch.accumulator((launch.grid[1] * size.B, this.sums, H)) if len(weights) > 2 else None
        launch(*fixed, residual if corrections else None, None, d, d_candidate, sums)

        if this.gates == 1:
            d_ih, d_hh = d.T @ rows(x).to(y.dtype), d.T @ h
        else:
            d_ih, d_hh = _weight_gradients(where, size, inputs, d, d_candidate, shared)
        d_ih, d_hh = d_ih.to(weights[0].dtype), d_hh.to(weights[1].dtype)
        d_x = (d @ w_ih).view(x.shape).to(x.dtype) if needs_x else x.new_empty(0)
        biases = (x.new_empty(0), x.new_empty(0))
        if sums is not None:
            total = (sums.sum(0) if size.N else sums.new_zeros(sums.shape[1:])).to(weights[2].dtype)
            b_ih = total[: this.gates].flatten()
            b_hh = torch.cat([total[:2], total[3:]]).flatten() if this.separate_candidate else b_ih.clone()
            biases = (b_ih, b_hh)
    return d_x, initial[0], initial[1] if len(initial) > 1 else x.new_empty(0), d_ih, d_hh, *biases


def _weight_gradients(
    where: Columns, size: Sizes, inputs: Tensor, d: Tensor, d_candidate: Tensor | None, shared: int
) -> tuple[Tensor, Tensor]:
    """d_input^T x and d_hidden^T h."""
    x, h = where.x(inputs), where.h(inputs)
    if d_candidate is None:
        if not size.fused:
            return d.T @ x, d.T @ h
        both = d.T @ inputs
        return where.x(both).contiguous(), where.h(both).contiguous()
    d_ih, d_hh = inputs.new_empty((d.shape[1], size.I)), inputs.new_empty((d.shape[1], size.H))
    torch.mm(d_candidate.T, h, out=d_hh[shared:])
    if size.fused:
        both = d[:, :shared].T @ inputs
        d_ih[:shared], d_hh[:shared] = where.x(both), where.h(both)
        torch.mm(d[:, shared:].T, x, out=d_ih[shared:])
    else:
        torch.mm(d.T, x, out=d_ih)
        torch.mm(d[:, :shared].T, h, out=d_hh[:shared])
    return d_ih, d_hh


class _Reverse:
    """The launches of one pass over time, with what all passes of a rule share."""

    def __init__(
        self,
        cell: Cell,
        rule: str,
        size: Sizes,
        offsets: Tensor | None,
        reverse: bool,
        gates: Tensor,
        saved: Tensor,
        state: Tensor,
    ) -> None:
        self.cell, self.size, self.offsets = cell, size, offsets
        self.reads = (gates, saved, state, state.stride(0))
        self.dtype = torch.promote_types(state.dtype, torch.float32)
        self.device = state.device
        lanes, self.length, self.grid = chunks.launch(size.T, size.B * size.H, state)
        self.state = state
        self.constants = {
            **cell.constants, "RULE": rule, "REVERSE": reverse, "ACC": chunks.accumulator(self.dtype), "LANES": lanes,
        }  # fmt: skip

    def accumulator(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def __call__(
        self,
        w_hh: Tensor,
        diagonal: Tensor | None,
        e: Tensor | None,
        final_e: Sequence[Tensor | None],
        initial: list[Tensor],
        residual: Tensor | None,
        next_residual: Tensor | None,
        d: Tensor,
        d_candidate: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        """One pass; ``residual`` holds what the pass before left, ``next_residual`` takes its direct part."""
        T, B, N, _, H = self.size
        if not N:
            return
        final_h, final_c = (*(None if g is None else g.contiguous() for g in final_e), None)[:2]
        reads = (
            *self.reads, w_hh.contiguous(), diagonal, self.offsets, e, 0 if e is None else e.stride(0),
        )  # fmt: skip
        sizes = (T, B, H, self.length)
        constants = {**self.constants, "PAIRS": chunks.pairs(H, self.state, e)}
        summary = None
        if self.grid[1] > 1:
            summary = self.accumulator((self.grid[1], 5 if self.cell.states == 2 else 2, B * H))
            kernels.summarize[self.grid](*reads, residual, summary, *sizes, **constants)
        kernels.run[self.grid](
            *reads, final_h, final_c, residual, summary, next_residual, d, d_candidate, sums,
            initial[0], initial[1] if len(initial) > 1 else None, *sizes, **constants,
        )  # fmt: skip


# Registration ---------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("statefeed", "FRAGMENT")
_LIBRARY.define(
    "triton_recompute(str cell, Tensor x, Tensor y, Tensor[] state, Tensor[] weights, Tensor? offsets, bool reverse, "
    "str precision) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "triton_mean_jacobian(str cell, Tensor inputs, Tensor gates, Tensor saved, Tensor y, Tensor w_hh, SymInt B, "
    "Tensor? offsets) -> Tensor"
)
_LIBRARY.define(
    "triton_backward(str cell, str rule, Tensor inputs, Tensor(a!) gates, Tensor(b!) saved, Tensor x, Tensor y, "
    "Tensor[] state, Tensor[] weights, Tensor?[] grads, Tensor? diagonal, Tensor? offsets, int corrections, "
    "bool reverse, bool needs_x, str precision) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _name, _implementation in (
    ("triton_recompute", _recompute),
    ("triton_mean_jacobian", _mean_jacobian),
    ("triton_backward", _backward),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("statefeed::triton_recompute", lib=_LIBRARY)
def _recompute_fake(
    cell: str,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    offsets: Tensor | None,
    reverse: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    this, H = CELLS[cell], y.shape[-1]
    N = y.shape[0] * y.shape[1] if offsets is None else y.shape[0]
    inputs = y.new_empty((N, columns(x.shape[-1] if this.gates > 1 else 0, H, y.dtype).width))
    if this.gates == 1:
        return inputs, y.new_empty(0), y.new_empty(0)
    dtype = torch.promote_types(y.dtype, torch.float32) if this.saved == "cell_state" else y.dtype
    return inputs, y.new_empty((N, this.gates * H)), y.new_empty((N, H), dtype=dtype)


@torch.library.register_fake("statefeed::triton_mean_jacobian", lib=_LIBRARY)
def _mean_jacobian_fake(
    cell: str, inputs: Tensor, gates: Tensor, saved: Tensor, y: Tensor, w_hh: Tensor, B: int, offsets: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(CELLS[cell].states * y.shape[-1], dtype=dtype)


@torch.library.register_fake("statefeed::triton_backward", lib=_LIBRARY)
def _backward_fake(
    cell: str,
    rule: str,
    inputs: Tensor,
    gates: Tensor,
    saved: Tensor,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    diagonal: Tensor | None,
    offsets: Tensor | None,
    corrections: int,
    reverse: bool,
    needs_x: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    parts = (*state, None)[:2], (*weights, None, None)[:4]
    return like(x if needs_x else None), *(like(s) for s in parts[0]), *(like(w) for w in parts[1])
