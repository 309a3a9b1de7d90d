"""Sizes of one layer's rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.gather import Columns, columns

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


def sizes_of(x: Tensor, state: Tensor, offsets: Tensor | None) -> Sizes:
    B, H = state.shape
    T = len(x) if offsets is None else len(offsets) - 1
    return Sizes(T, B, T * B if offsets is None else len(x), x.shape[-1], H)


def rows(tensor: Tensor) -> Tensor:
    """(N, H) with adjacent units; a view unless the strides forbid it, as of one direction's half of y."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def columns_of(cell: Cell, size: Sizes, dtype: torch.dtype) -> Columns:
    return columns(size.I if cell.gates > 1 else 0, size.H, dtype)
