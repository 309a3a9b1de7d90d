"""A batch cut into pieces by lengths and resets: every piece is a sequence of its own, laid out as packed rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pieces(NamedTuple):
    """How the steps of a (T, B) batch lie as packed rows, the longest piece first.

    Attributes:
        source: (N,), the step t * B + b behind each packed row.
        batch_sizes: rows of every packed step, on the CPU.
        row: (P,), the row b that each piece is cut from.
        first: (B,), the piece that each row begins with.
        last: (B,), the piece that each row ends with.
        fresh: (P,), whether a piece begins with a state of zero.
    """

    source: Tensor
    batch_sizes: Tensor
    row: Tensor
    first: Tensor
    last: Tensor
    fresh: Tensor

    def initial(self, state: Tensor, directions: int) -> Tensor:
        """The initial state of every piece, (K, P, H), from that of every row, (K, B, H).

        The forward direction enters a row at its first piece, the reverse one at its last; other pieces start at zero.
        """
        enters = ~self.fresh
        if directions == 2:
            from_the_end = torch.zeros_like(self.fresh)
            from_the_end[self.last] = True
            enters = torch.stack([enters, from_the_end]).repeat(len(state) // 2, 1)[..., None]
        else:
            enters = enters[:, None]
        return torch.where(enters, state[:, self.row], torch.zeros_like(state[:, :1]))

    def final(self, state: Tensor, directions: int) -> Tensor:
        """The final state of every row, (K, B, H), from that of every piece, (K, P, H)."""
        if directions == 1:
            return state[:, self.last]
        leaves = torch.stack([self.last, self.first]).repeat(len(state) // 2, 1)
        return state.gather(1, leaves[..., None].expand(-1, -1, state.shape[-1]))


def cut(T: int, B: int, lengths: Tensor | None, resets: Tensor | None, device: torch.device) -> Pieces:
    """Cut a (T, B) batch where sequences end and where new ones begin.

    Args:
        T: steps.
        B: rows.
        lengths: (B,), integer, steps of every row that count, from 1 to T; all of them if None.
        resets: (T, B), bool, true where a new sequence begins inside a row; nowhere if None.
        device: of the returned tensors, except ``batch_sizes``.

    Raises:
        ValueError: another shape or dtype, or a length outside 1..T.
    """
    if lengths is None:
        lengths = torch.full((B,), T)
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be whole numbers of shape (B,) = ({B},), got {lengths.dtype} {tuple(lengths.shape)}"
        )
    lengths = lengths.cpu().to(torch.int64)
    if B and (int(lengths.min()) < 1 or int(lengths.max()) > T):
        raise ValueError(f"lengths must lie between 1 and T = {T}, got {int(lengths.min())} to {int(lengths.max())}")
    if resets is None:
        resets = torch.zeros(T, B, dtype=torch.bool)
    if resets.shape != (T, B) or resets.dtype != torch.bool:
        raise ValueError(f"resets must be bool of shape (T, B) = ({T}, {B}), got {resets.dtype} {tuple(resets.shape)}")
    resets = resets.cpu()

    begins = resets.clone()
    begins[:1] = True
    begins &= torch.arange(T)[:, None] < lengths
    row, start = begins.T.nonzero(as_tuple=True)
    new_row = torch.ones_like(row, dtype=torch.bool)
    new_row[1:] = row[1:] != row[:-1]
    stop = torch.where(new_row.roll(-1), lengths[row], start.roll(-1))

    length, order = (stop - start).sort(descending=True, stable=True)
    place = order.argsort()
    steps = torch.arange(int(length[0]) if len(length) else 0)[:, None]
    lies = steps < length
    source = ((start[order] + steps) * B + row[order])[lies]
    fresh = ~new_row | resets[0, row]
    pieces = Pieces(source, lies.sum(1), row[order], place[new_row], place[new_row.roll(-1)], fresh[order])
    return Pieces(*(t if name == "batch_sizes" else t.to(device) for name, t in pieces._asdict().items()))
