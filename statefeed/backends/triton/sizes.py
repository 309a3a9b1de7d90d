"""Sizes of one layer and its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.gather import Columns, columns

# Concatenated weights save passes over the rows but cost four passes over the weights, so they need many rows.
_FUSE_ROWS = 4


class Sizes(NamedTuple):
    """T steps, B rows of the first, N rows in all, I features, H units; O units of h, H unless it is projected."""

    T: int
    B: int
    N: int
    I: int
    H: int
    O: int

    @property
    def fused(self) -> bool:
        """Whether x and h are multiplied by the concatenated weights."""
        return self.N >= _FUSE_ROWS * self.H


def sizes_of(x: Tensor, state: Sequence[Tensor], offsets: Tensor | None) -> Sizes:
    B, O = state[0].shape
    N, I = x.shape
    return Sizes(steps_of(N, B, offsets), B, N, I, state[-1].shape[1], O)


def steps_of(N: int, B: int, offsets: Tensor | None) -> int:
    """T of N rows."""
    return N // max(B, 1) if offsets is None else len(offsets) - 1


def adjacent(rows: Tensor) -> Tensor:
    """Rows (N, H) with adjacent units; only rows with strided units are copied."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def head_width(w_hh: Tensor, O: int) -> int:
    """Units of a head, which are the columns of a block-diagonal W_hh; 0 if W_hh is dense."""
    return 0 if w_hh.shape[1] == O else w_hh.shape[1]


def columns_of(cell: Cell, size: Sizes, dtype: torch.dtype) -> Columns:
    return columns(size.I if cell.gathers_x else 0, size.O, dtype)
