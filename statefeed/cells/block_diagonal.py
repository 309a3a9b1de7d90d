"""Block-diagonal recurrent weights: the units of h are divided into equal heads, each with its own block per gate.

W_hh is stored without its zeros, (G*H, H / heads): row g*H + u belongs to gate g and unit u, and its columns are the
units of u's head. The number of heads is therefore ``H / w_hh.shape[1]``; with one head W_hh is dense.
"""

from __future__ import annotations

from torch import Tensor

from statefeed.cells.protocol import Cell


class BlockDiagonalCell(Cell):
    """Base class of cells with block-diagonal recurrent weights."""

    def hidden_product(self, h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
        w = self.blocks(w_hh)
        _, heads, width, _ = w.shape
        if heads == 1:
            return super().hidden_product(h, w_hh, b_hh)
        products = h.view(-1, heads, width).transpose(0, 1) @ w.mT
        hidden = products.permute(2, 0, 1, 3).flatten(1)
        return hidden if b_hh is None else hidden + b_hh

    def hidden_by_gate(self, addend: Tensor, h: Tensor, w_hh: Tensor) -> Tensor:
        w = self.blocks(w_hh)
        _, heads, width, _ = w.shape
        if heads == 1:
            return super().hidden_by_gate(addend, h, w_hh)
        products = h.view(-1, heads, width).transpose(0, 1) @ w.mT
        return addend + products.transpose(1, 2).flatten(2)

    def grad_h(self, grad_hidden: Tensor, w_hh: Tensor) -> Tensor:
        w = self.blocks(w_hh)
        if w.shape[1] == 1:
            return super().grad_h(grad_hidden, w_hh)
        products = self._by_head(grad_hidden.to(w.dtype), w) @ w.transpose(0, 1).flatten(1, 2)
        return products.transpose(0, 1).flatten(1)

    def grad_w_hh(self, grad_hidden: Tensor, h: Tensor, w_hh: Tensor) -> Tensor:
        w = self.blocks(w_hh)
        gates, heads, width, _ = w.shape
        if heads == 1:
            return super().grad_w_hh(grad_hidden, h, w_hh)
        h = h.to(w.dtype).view(-1, heads, width).transpose(0, 1)
        products = self._by_head(grad_hidden.to(w.dtype), w).mT @ h
        return products.view(heads, gates, width, width).transpose(0, 1).reshape(w_hh.shape).to(w.dtype)

    def blocks(self, w_hh: Tensor) -> Tensor:
        """W_hh as (G, heads, H / heads, H / heads)."""
        width = w_hh.shape[1]
        return w_hh.reshape(self.gates, -1, width, width)

    def diagonals(self, w_hh: Tensor) -> tuple[Tensor, ...]:
        """The weight from every unit to itself, (H,) for every gate."""
        return self.blocks(w_hh).diagonal(dim1=-2, dim2=-1).flatten(1).unbind()

    def _by_head(self, grad_hidden: Tensor, w: Tensor) -> Tensor:
        """(N, G*H) as (heads, N, G * H / heads)."""
        gates, heads, width, _ = w.shape
        return grad_hidden.reshape(-1, gates, heads, width).permute(2, 0, 1, 3).flatten(2)
