"""The launches of one pass over time of the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statefeed.backends.triton import reverse as kernels
from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.sizes import Sizes, head_width
from statefeed.scan import chunks


class Reverse:
    """The launches of one pass over time, with the arguments that all passes of a rule share."""

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
            **cell.constants, "PROJECTED": cell.projects, "RULE": rule, "REVERSE": reverse,
            "ACC": chunks.accumulator(self.dtype), "LANES": lanes,
        }  # fmt: skip

    def accumulator(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def residual(self) -> tuple[Tensor, ...]:
        """Memory for what a correction adds to the gradient of the state before: its parts side by side."""
        return (self.accumulator((self.size.N, self.cell.states * self.size.H)),)

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
        """One pass; reads ``residual`` of the previous pass and writes the direct part of ``next_residual``, if any."""
        T, B, N, _, H, _ = self.size
        if not N:
            return
        fed_back, remainder = (*residual, None)[0], (*next_residual, None)[0]
        final = (*(None if g is None else g.contiguous() for g in final_e), None, None)[:3]
        reads = (
            *self.reads, w_hh.contiguous(), diagonal, self.offsets, e, 0 if e is None else e.stride(0),
        )  # fmt: skip
        sizes = (T, B, H, self.length)
        head, pairs = head_width(w_hh, self.size.O), chunks.pairs(H, self.state, e)
        constants = {**self.constants, "HEAD": head, "PAIRS": pairs}
        summary = None
        if self.grid[1] > 1:
            summary = self.accumulator((self.grid[1], 3 * self.cell.states - 1, B * H))
            kernels.summarize[self.grid](*reads, fed_back, summary, *sizes, **constants)
        kernels.run[self.grid](
            *reads, *final, fed_back, summary, remainder, d, d_candidate, sums, *(*initial, None, None)[:3], *sizes,
            **constants,
        )  # fmt: skip
