"""Backward pass of a cell with a projected output, h = u W_hr^T: a pass over h, a product, and a pass over c.

delta = e + carry,   carry' = D_h delta + residual_h        the scan of h, which no gate enters
grad_u = delta W_hr                                         one product over all rows
gamma, gradients at the gates                               the kernels of the cell, with grad_u in place of e
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.cells.rnn import local
from statefeed.backends.triton.launches import Reverse
from statefeed.backends.triton.sizes import Sizes
from statefeed.cells.protocol import projected_w_hh
from statefeed.scan import chunks

_LANES = 256


@triton.jit
def _output_factors(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, mask, ACC: tl.constexpr):
    """A state that no weight feeds back: its gradient itself, and no direct path."""
    none = tl.zeros_like(unit).to(ACC)
    return (none + 1,), (none,), (), (none,)


_OUTPUT = Cell("projected output", 1, 1, 1, _output_factors, local)


class OfProjection(NamedTuple):
    """The weights of h, in the dtype of the products, and D of the whole state, if the caller made it."""

    w_hh: Tensor
    w_hr: Tensor
    diagonal: Tensor | None


class ProjectedReverse:
    """As ``Reverse``, for a cell with a projected output; ``delta`` is the gradient of h in the last pass."""

    def __init__(
        self,
        cell: Cell,
        rule: str,
        size: Sizes,
        offsets: Tensor | None,
        reverse: bool,
        gates: Tensor,
        saved: Tensor,
        h: Tensor,
        weights: OfProjection,
    ) -> None:
        self.w_hr = weights.w_hr
        self.output = _of_rows(_outputs, cell, gates, saved, h.dtype, 1)  # before the passes overwrite the gates
        self.delta = h.new_empty((size.N, size.O))
        rule_of_h = rule_of_c = rule
        self.D_h: Tensor | None = None
        self.D_c: Tensor | None = None
        if weights.diagonal is not None:
            parts = weights.diagonal.split([size.O, size.H], -1)
            self.D_h, self.D_c = parts[0].contiguous(), parts[1].contiguous()
        elif rule == "jacobian":
            rule_of_h, rule_of_c = "per_row", "direct"  # D of c is f under both
            self.D_h = diagonal_of_h(cell, gates, saved, projected_w_hh(weights.w_hh, weights.w_hr))
        rows = h if h.stride(1) == 1 else h.contiguous()
        self.of_h = Reverse(_OUTPUT, rule_of_h, size._replace(H=size.O), offsets, reverse, rows, rows, rows)
        self.of_c = Reverse(cell, rule_of_c, size, offsets, reverse, gates, saved, rows)
        self.grid, self.accumulator = self.of_c.grid, self.of_c.accumulator

    def residual(self) -> tuple[Tensor, ...]:
        """Memory for what a correction adds to the gradients of h and of c of the step before."""
        size = self.of_c.size
        return self.accumulator((size.N, size.O)), self.accumulator((size.N, size.H))

    def __call__(
        self,
        w_hh: Tensor,
        diagonal: Tensor | None,
        e: Tensor | None,
        final_e: Sequence[Tensor | None],
        initial: Sequence[Tensor | None],
        residual: Sequence[Tensor],
        next_residual: Sequence[Tensor],
        d: Tensor,
        d_candidate: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        """One pass, with the arguments of ``Reverse``."""
        self.of_h(
            w_hh, self.D_h, e, final_e[:1], initial[:1], residual[:1], next_residual[:1], self.delta, None, None
        )  # fmt: skip
        grad_u = self.delta @ self.w_hr
        self.of_c(
            w_hh, self.D_c, grad_u, (None, final_e[1]), (None, initial[1]), residual[1:], next_residual[1:],
            d, None, sums,
        )  # fmt: skip


def diagonal_of_h(cell: Cell, gates: Tensor, saved: Tensor, w_hh: Tensor) -> Tensor:
    """D of h at every row, (N, O): ``sum_gj du_j/dpre_gj w_hh[gj, p]``, with ``projected_w_hh``.

    Cost: one pass over the gates, and one product (N, H) x (H, O) per gate.
    """
    dtype = torch.promote_types(w_hh.dtype, torch.float32)
    return _of_rows(_derivatives, cell, gates, saved, dtype, cell.gates) @ w_hh.to(dtype)


def mean_projected(cell: Cell, gates: Tensor, saved: Tensor, w_hh: Tensor) -> Tensor:
    """The mean of diag(J[t]) over all rows, (S,): the mean of the derivatives of u, then one product."""
    H = gates.shape[1] // cell.gates
    derivatives = _of_rows(_derivatives, cell, gates, saved, w_hh.dtype, cell.gates)
    of_c = _of_rows(_direct_paths, cell, gates, saved, w_hh.dtype, 1)
    assert of_c.shape[1] == H
    return torch.cat([derivatives.mean(0) @ w_hh, of_c.mean(0)])


def _of_rows(kernel: Any, cell: Cell, gates: Tensor, saved: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    """What a kernel computes of every unit of every row, (N, parts * H)."""
    N, H = saved.shape
    out = gates.new_empty((N, parts * H), dtype=dtype)
    if out.numel():
        accumulator = chunks.accumulator(torch.promote_types(gates.dtype, torch.float32))
        kernel[(triton.cdiv(N * H, _LANES),)](
            gates, saved, out, N, H, FACTORS=cell.factors, OUTPUT=cell.output, ACC=accumulator, LANES=_LANES
        )  # fmt: skip
    return out


@triton.jit
def _row_and_unit(N, H, LANES: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    return lane // H, lane % H, lane < tl.cast(N, tl.int64) * H


@triton.jit(do_not_specialize=["N"])
def _outputs(
    gates, saved, out, N, H, FACTORS: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr
):
    """u."""
    row, unit, mask = _row_and_unit(N, H, LANES)
    tl.store(out + row * H + unit, OUTPUT(gates, saved, row, unit, H, mask, ACC), mask)


@triton.jit(do_not_specialize=["N"])
def _derivatives(
    gates, saved, out, N, H, FACTORS: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr
):
    """The derivatives of u by the pre-activations of four gates, of which the last acts on u and the others on c."""
    row, unit, mask = _row_and_unit(N, H, LANES)
    none = tl.zeros_like(unit).to(ACC)
    k, _, of_u, _ = FACTORS(gates, saved, gates, 0, none, none, none, none, row, unit, H, mask, ACC)
    at = out + row * (4 * H) + unit
    tl.store(at, of_u[0] * k[0], mask)
    tl.store(at + H, of_u[0] * k[1], mask)
    tl.store(at + 2 * H, of_u[0] * k[2], mask)
    tl.store(at + 3 * H, k[3], mask)


@triton.jit(do_not_specialize=["N"])
def _direct_paths(
    gates, saved, out, N, H, FACTORS: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr
):
    """The direct path of c."""
    row, unit, mask = _row_and_unit(N, H, LANES)
    none = tl.zeros_like(unit).to(ACC)
    _, direct, _, _ = FACTORS(gates, saved, gates, 0, none, none, none, none, row, unit, H, mask, ACC)
    tl.store(out + row * H + unit, direct[1], mask)
