"""Layouts of the rows of a batch: dense, packed, and segmented by lengths and resets.

A layer works on rows, one for every step of every sequence, time first. A dense batch (T, B, .) has B rows per step. A
packed batch is laid out as in torch's PackedSequence: sequences are sorted by length, longest first, and step t has
``batch_sizes[t]`` rows, which never increase. In both, row (t, b) is therefore ``offset[t] + b``, with
``offset[t] = batch_sizes[:t].sum()`` or ``t * B``, and the row of the same sequence one step earlier is
``offset[t-1] + b``. Matrix products never include padding: rows become a (T, B, .) grid only for a scan over
time, and in ``statefeed/newton.py``, whose iterations alternate between the two.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary


class Layout:
    """Positions of rows in time: T steps of at most B rows each, and the index tensors made from ``batch_sizes``.

    The index tensors are made once per ``batch_sizes`` tensor. A CUDA graph of a packed layer can therefore be captured
    after one call with the same PackedSequence: copies from the CPU are not allowed during capture.

    Args:
        T: number of steps.
        B: rows of the first step, which is the number of sequences.
        batch_sizes: number of rows of every step, int64 (T,) on the CPU, non-increasing; None if every step has B rows.
    """

    def __init__(self, T: int, B: int, batch_sizes: Tensor | None = None) -> None:
        self.T, self.B, self.batch_sizes = T, B, batch_sizes
        self._on_device = _index_tensors(batch_sizes)

    @property
    def ragged(self) -> bool:
        """Whether sequences have different lengths."""
        return self.batch_sizes is not None and int(self.batch_sizes[-1]) < self.B

    def grid(self, rows: Tensor) -> Tensor:
        """Rows (N, .) as (T, B, .), zero after the end of a sequence."""
        if self.batch_sizes is None:
            return rows.view(self.T, self.B, *rows.shape[1:])
        padded: Tensor = torch._VF._pad_packed_sequence(rows, self.batch_sizes, False, 0.0, -1)[0]
        return padded

    def rows(self, grid: Tensor) -> Tensor:
        """Rows (N, .) of a grid (T, B, .); the inverse of ``grid``."""
        if self.batch_sizes is None:
            return grid.flatten(0, 1)
        packed: Tensor = torch._VF._pack_padded_sequence(grid, self.lengths(), False)[0]
        return packed

    def steps(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of every step, a tuple of T tensors."""
        return torch.split(rows, self.B if self.batch_sizes is None else self.batch_sizes.tolist())

    def previous(self, rows: Tensor, initial: Tensor) -> Tensor:
        """For every row, the row of the same sequence one step earlier; ``initial`` (B, .) at the first step."""
        if self.batch_sizes is None:
            return torch.cat([initial, rows[: len(rows) - self.B]])
        return self.rows(torch.cat([initial[None], self.grid(rows)[:-1]]))

    def first(self, rows: Tensor) -> Tensor:
        """The rows of the first step, (B, .)."""
        return rows[: self.B]

    def last(self, rows: Tensor, initial: Tensor) -> Tensor:
        """A copy of the row of every sequence's last step, (B, .); a copy of ``initial`` if there is no step."""
        count = rows.shape[0]
        if not count:
            return initial.clone()
        if self.batch_sizes is None:
            return rows[count - self.B :].clone()
        offset = self.batch_sizes.cumsum(0) - self.batch_sizes
        return rows[(offset[self.lengths() - 1] + torch.arange(self.B, device="cpu")).to(rows.device)]

    def scatter_final(self, final: Tensor) -> Tensor:
        """A grid of zeros (T, B, .) with ``final`` (B, .) at the last step of every sequence."""
        grid = final.new_zeros(self.T, *final.shape)
        if self.batch_sizes is None:
            grid[-1] = final
        else:
            grid[self.lengths() - 1, torch.arange(self.B, device="cpu")] = final
        return grid

    def lengths(self) -> Tensor:
        """Steps of every sequence, int64 (B,) on the CPU."""
        if self.batch_sizes is None:
            return torch.full((self.B,), self.T, device="cpu")
        return (self.batch_sizes[:, None] > torch.arange(self.B, device="cpu")).sum(0)

    def reverse(self, rows: Tensor) -> Tensor:
        """Every sequence reversed in time within its own length; its own inverse."""
        if self.batch_sizes is None:
            return self.grid(rows).flip(0).flatten(0, 1)
        return rows[self._cached("reversal", _reversal, rows.device)]

    def offsets(self, device: torch.device) -> Tensor | None:
        """The first row of every step and the end of the last step, int64 (T + 1,) on a device; None if dense."""
        return None if self.batch_sizes is None else self._cached("offsets", _offsets, device)

    def _cached(self, name: str, make: Callable[[Layout], Tensor], device: torch.device) -> Tensor:
        key = f"{name} {device}"
        if key not in self._on_device:
            # Without non_blocking the host would wait for all queued work of the device.
            self._on_device[key] = make(self).to(device, non_blocking=True)
        return self._on_device[key]


# batch_sizes -> its version, and the index tensors made from it.
_INDEX_TENSORS: MutableMapping[Tensor, tuple[int, dict[str, Tensor]]] = WeakTensorKeyDictionary()


def _index_tensors(batch_sizes: Tensor | None) -> dict[str, Tensor]:
    """The index tensors that earlier calls made from this tensor, none if it was changed in place since."""
    if batch_sizes is None or torch.compiler.is_compiling() or batch_sizes.is_inference():
        return {}
    version, tensors = _INDEX_TENSORS.get(batch_sizes, (-1, {}))
    if version != batch_sizes._version:
        tensors = {}
        _INDEX_TENSORS[batch_sizes] = batch_sizes._version, tensors
    return tensors


def _offsets(layout: Layout) -> Tensor:
    assert layout.batch_sizes is not None
    return F.pad(layout.batch_sizes.cumsum(0), (1, 0))


def _reversal(layout: Layout) -> Tensor:
    """Index of the time-reversed row of every packed row, int64 (N,).

    Step t of sequence b becomes step ``length[b] - 1 - t``: its row is ``offset[length[b] - 1 - t] + b``.
    """
    assert layout.batch_sizes is not None
    offset = _offsets(layout)
    step = torch.repeat_interleave(torch.arange(layout.T, device="cpu"), layout.batch_sizes)
    sequence = torch.arange(len(step), device="cpu") - offset[step]
    return offset[layout.lengths()[sequence] - 1 - step] + sequence


def shift_left(grid: Tensor) -> Tensor:
    """Values one step later in time, zero after the last step."""
    return torch.cat([grid[1:], torch.zeros_like(grid[:1])])


class Segments(NamedTuple):
    """A padded batch split into segments at the ends of rows and at resets.

    A segment is a range of consecutive steps of one row. Sorted by length, longest first, segments form a packed batch.
    Step s of segment p is step ``start[p] + s`` of row ``row[p]``, at position ``(start[p] + s) * B + row[p]`` of the
    T * B steps of the batch. ``gather_index`` lists these positions in packed order.

    Attributes:
        gather_index: (N,), the position t * B + b of every packed row.
        batch_sizes: number of rows of every packed step, int64, on the CPU.
        row: (P,), the row b of every segment.
        first: (B,), the first segment of every row.
        last: (B,), the last segment of every row.
        is_start: (P,), whether a segment starts from a zero state.
    """

    gather_index: Tensor
    batch_sizes: Tensor
    row: Tensor
    first: Tensor
    last: Tensor
    is_start: Tensor

    def initial(self, state: Tensor, directions: int) -> Tensor:
        """The initial state of every segment, (K, P, H), from that of every row, (K, B, H).

        The forward direction starts a row at its first segment, the reverse direction at its last; all other segments
        start from zero.
        """
        keep_mask = ~self.is_start
        if directions == 2:
            is_last = torch.zeros_like(self.is_start)
            is_last[self.last] = True
            keep_mask = torch.stack([keep_mask, is_last]).repeat(len(state) // 2, 1)[..., None]
        else:
            keep_mask = keep_mask[:, None]
        return torch.where(keep_mask, state[:, self.row], torch.zeros_like(state[:, :1]))

    def final(self, state: Tensor, directions: int) -> Tensor:
        """The final state of every row, (K, B, H), from that of every segment, (K, P, H)."""
        if directions == 1:
            return state[:, self.last]
        ends = torch.stack([self.last, self.first]).repeat(len(state) // 2, 1)
        return state.gather(1, ends[..., None].expand(-1, -1, state.shape[-1]))


def segment(T: int, B: int, lengths: Tensor | None, resets: Tensor | None, device: torch.device) -> Segments:
    """Split a (T, B) batch into segments at the ends of rows and at resets.

    Args:
        T: number of steps.
        B: number of rows.
        lengths: (B,), integer, number of valid steps of every row, 1 to T; T if None.
        resets: (T, B), bool, true where a new sequence begins inside a row; false everywhere if None.
        device: device of the returned tensors, except ``batch_sizes``.

    Returns:
        ``Segments``, longest first.

    Raises:
        ValueError: wrong shape or dtype, or a length outside 1..T.
    """
    cpu = torch.device("cpu")
    if lengths is None:
        lengths = torch.full((B,), T, device=cpu)
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers of shape (B,) = ({B},), got {lengths.dtype} {tuple(lengths.shape)}")
    lengths = lengths.cpu().to(torch.int64)
    if B and (int(lengths.min()) < 1 or int(lengths.max()) > T):
        raise ValueError(f"lengths must be between 1 and T = {T}, got {int(lengths.min())} to {int(lengths.max())}")
    if resets is None:
        resets = torch.zeros(T, B, dtype=torch.bool, device=cpu)
    if resets.shape != (T, B) or resets.dtype != torch.bool:
        raise ValueError(f"resets must be bool of shape (T, B) = ({T}, {B}), got {resets.dtype} {tuple(resets.shape)}")
    resets = resets.cpu()

    # Segments in order of rows: the first step of each, and the step after its last (the next start, or the length).
    starts = resets.clone()
    starts[:1] = True
    starts &= torch.arange(T, device=cpu)[:, None] < lengths
    row, start = starts.T.nonzero(as_tuple=True)
    new_row = torch.ones_like(row, dtype=torch.bool)
    new_row[1:] = row[1:] != row[:-1]
    stop = torch.where(new_row.roll(-1), lengths[row], start.roll(-1))

    # Sort by length, longest first; ``place`` is the new position of every segment.
    length, order = (stop - start).sort(descending=True, stable=True)
    place = order.argsort()
    steps = torch.arange(int(length[0]) if len(length) else 0, device=cpu)[:, None]
    valid = steps < length
    gather_index = ((start[order] + steps) * B + row[order])[valid]
    is_start = ~new_row | resets[0, row]
    segments = Segments(
        gather_index=gather_index,
        batch_sizes=valid.sum(1),
        row=row[order],
        first=place[new_row],
        last=place[new_row.roll(-1)],
        is_start=is_start[order],
    )
    return Segments(*(t if name == "batch_sizes" else t.to(device) for name, t in segments._asdict().items()))
