"""Recomputation of the gates and cell states of one layer from its outputs; the forward pass stores nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statefeed.backends.triton.cells import CELLS
from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.cells.lstm import cell_step
from statefeed.backends.triton.gather import Columns, gather
from statefeed.backends.triton.precision import matmul_precision
from statefeed.backends.triton.sizes import Sizes, adjacent, columns_of, sizes_of
from statefeed.scan.triton import device_of, solve


def recompute(
    cell: str,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    offsets: Tensor | None,
    reverse: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gathered inputs, pre-activations (N, G * H) and the cell's other saved values, in the dtype of y.

    Args:
        cell: name in the table of cells.
        x: rows (N, I), in time order.
        y: h after every step, (N, O), O = H unless it is projected.
        state: initial (h,) or (h, c), each (B, H).
        weights: w_ih (G*H, I), w_hh (G*H, O), if there are biases b_ih and b_hh (G*H,), and if h is projected w_hr.
        offsets: first row of every step and the end of the last step, (T + 1,), int64, on the device; None if every
            step has B rows.
        reverse: time runs from T - 1 down to 0.
        precision: of float32 products on CUDA, ``"tf32"`` or ``"ieee"``; ``""`` for cuDNN's current RNN setting.

    Returns:
        ``inputs`` from ``gather``; ``gates`` and ``saved``, empty if the cell has none.

    Gradient: none.

    Cost: two products over all rows, none for an RNN; for an LSTM one scan.
    """
    this, size, outputs = CELLS[cell], sizes_of(x, state, offsets), adjacent(y)
    where = columns_of(this, size, y.dtype)
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
    w_ih, w_hh, *biases = weights[:4] if len(weights) > 3 else weights[:2]
    x, h = where.x(inputs), where.h(inputs)
    shared = cell.shared_gates * size.H
    b_sum = biases[0][:shared] + biases[1][:shared] if biases else None
    gates = inputs.new_empty((size.N, cell.gates * size.H))
    first = gates[:, :shared]
    if size.fused:
        _linear(inputs, _side_by_side(w_ih[:shared], w_hh[:shared], where), b_sum, first)
    else:
        _linear(x, w_ih[:shared], b_sum, first)
        first.addmm_(h, w_hh[:shared].T)
    if cell.shared_gates == cell.gates:
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
