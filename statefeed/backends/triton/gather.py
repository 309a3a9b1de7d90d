"""Gathered rows for a layer's products: x and h before the step next to each other, in the dtype of the products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from statefeed.scan.chunks import row_at

_LANES = 1024


class Columns(NamedTuple):
    """Columns of x and h in a row of the gathered inputs; both begin at a multiple of 16 bytes."""

    I: int
    start: int
    H: int
    width: int

    def x(self, rows: Tensor) -> Tensor:
        return rows[:, : self.I]

    def h(self, rows: Tensor) -> Tensor:
        return rows[:, self.start : self.start + self.H]


def columns(I: int, H: int, dtype: torch.dtype) -> Columns:
    """Columns for I features of x (0 omits x) and H features of h."""
    align = max(16 // dtype.itemsize, 1)
    start = (I + align - 1) // align * align
    return Columns(I, start, H, start + (H + align - 1) // align * align)


def gather(
    x: Tensor | None, y: Tensor, initial: Tensor, offsets: Tensor | None, reverse: bool, where: Columns
) -> Tensor:
    """Rows of x and of h before the step, (N, width); columns between them are zero.

    Args:
        x: rows (N, I); None where ``where.I`` is 0.
        y: h after every step, rows (N, H); the result has its dtype.
        initial: h before the first step, (B, H).
        offsets: first row of every step and the end of the last step, (T + 1,); None if all steps have B rows.
        reverse: h before step t is h after step t + 1.
        where: from ``columns``.

    Cost: one pass: x and y read, both written.
    """
    B, width = len(initial), where.width
    out = y.new_empty((len(y), width))
    if not out.numel():
        return out
    T = len(y) // B if offsets is None else len(offsets) - 1
    if x is not None and x.stride(1) != 1:
        x = x.contiguous()
    _gather[(T, triton.cdiv(B * width, _LANES))](
        x, 0 if x is None else x.stride(0), y, y.stride(0), initial.contiguous(), offsets, out, T, B, *where,
        REVERSE=reverse, LANES=_LANES,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["T", "B"])
def _gather(
    x, x_stride, y, y_stride, initial, offsets, out, T, B, I, start, H, width,
    REVERSE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    b, column = lane // width, lane % width
    row, mask = row_at(t, b, B, offsets, lane < B * width)
    unit = column - start
    is_h = mask & (unit >= 0) & (unit < H)
    before = t + 1 if REVERSE else t - 1
    exists = (before >= 0) & (before < T)
    previous = tl.cast(before, tl.int64) * B + b
    has_previous = is_h & exists
    if offsets is not None:
        offset = tl.load(offsets + before, exists, 0)
        previous = offset + b
        has_previous = is_h & (b < tl.load(offsets + before + 1, exists, 0) - offset)
    value = tl.load(y + previous * y_stride + unit, has_previous, 0)
    value = tl.where(
        has_previous, value, tl.load(initial + b * H + unit, is_h & (has_previous == 0), 0).to(value.dtype)
    )
    if x is not None:
        is_x = mask & (column < I)
        value = tl.where(is_x, tl.load(x + row * x_stride + column, is_x, 0).to(value.dtype), value)
    tl.store(out + row * width + column, value, mask)
