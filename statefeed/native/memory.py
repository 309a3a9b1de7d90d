"""Reusable memory for the tensors that the forward pass saves.

Page faults of new memory cost as much as filling it. Only for tensors that never leave this package: unlike an ordinary
tensor, a tensor in this memory cannot be resized.

A block stays while training requests it. An idle block is freed once calls have requested four times the bytes of all
blocks without it: a block that every step requests stays however large the model is, and one freed too early costs
little compared with these requests. Calls that save nothing count what they would save, so that inference after
training frees all blocks.
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor, nn

_MIN_BYTES = 1 << 18  # for smaller tensors torch's allocator is as fast
_MAX_IDLE_BYTES = 1 << 27  # where a new block is needed
_ROUNDS = 4
_CHECKED_EVERY = 1 << 24  # bytes requested


class Block(mmap.mmap):
    """Memory for one tensor; ``handed_out`` is the number of bytes that were requested before its last tensor."""

    handed_out = 0


blocks: list[Block] = []
_lock = threading.Lock()
_requested = _checked = 0  # bytes so far, and at the last check for unused blocks


def empty(rows: int, width: int, like: Tensor) -> Tensor:
    """An uninitialized (rows, width) tensor with the dtype of ``like``; its memory is reused after it is freed."""
    if not is_ordinary(like):
        return like.new_empty(rows, width)
    count = rows * width
    size = count * like.element_size()
    if size < _MIN_BYTES or sys.platform == "win32":
        tensor = like.new_empty(rows, width)
    else:
        tensor = torch.frombuffer(_block(size), dtype=like.dtype, count=count).view(rows, width)
    _count(size)
    return tensor


def count_unsaved(like: Tensor, values: int) -> None:
    """Count what a call would save with autograd, as a number of tensors like this one, to free unused blocks."""
    if is_ordinary(like) and blocks:
        _count(values * like.nbytes)


def is_ordinary(like: Tensor) -> bool:
    """Whether a tensor has memory, and no trace, mode or subclass of tensors replaces it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or type(like) not in (Tensor, nn.Parameter)
    )


def _block(size: int) -> Block:
    """The smallest idle block that fits and is at most twice as large, else a new one."""
    with _lock:
        idle = sorted((blocks[i] for i in range(len(blocks)) if _is_idle(i)), key=len)
        for block in idle:
            if size <= len(block) <= 2 * size:
                block.handed_out = _requested
                return block
        excess = sum(map(len, idle)) - _MAX_IDLE_BYTES
        for block in idle:
            if excess > 0:
                excess -= len(block)
                blocks.remove(block)
        block = Block(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        block.handed_out = _requested
        blocks.append(block)
        return block


def _count(size: int) -> None:
    """Add to the requested bytes, and free the idle blocks that have not been handed out for a long time."""
    global _requested, _checked
    _requested += size
    if not blocks or _requested - _checked < _CHECKED_EVERY:
        return
    with _lock:
        _checked = _requested
        oldest = _requested - _ROUNDS * sum(map(len, blocks))
        for index in reversed(range(len(blocks))):
            if blocks[index].handed_out < oldest and _is_idle(index):
                del blocks[index]


def _is_idle(index: int) -> bool:
    return _reference_count(blocks, index) == _IDLE_COUNT


def _reference_count(blocks: list[Block], index: int) -> int:
    return sys.getrefcount(blocks[index])


# Reference count of a block that only the list references; a tensor in the block adds one.
_IDLE_COUNT = _reference_count([Block(-1, 1)], 0)
