"""Reusable memory for the tensors that the forward pass saves.

Page faults of new memory cost as much as filling it. Only for tensors that never leave this package: unlike an ordinary
tensor, a tensor in this memory cannot be resized.
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor, nn

_MIN_BYTES = 1 << 18  # for smaller tensors torch's allocator is as fast
_MAX_IDLE_BYTES = 1 << 27
blocks: list[mmap.mmap] = []
_lock = threading.Lock()


def empty(rows: int, width: int, like: Tensor) -> Tensor:
    """An uninitialized (rows, width) tensor with the dtype of ``like``; its memory is reused after it is freed."""
    if not _is_ordinary(like):
        return like.new_empty(rows, width)
    count = rows * width
    size = count * like.element_size()
    if size < _MIN_BYTES or sys.platform == "win32":
        return like.new_empty(rows, width)
    return torch.frombuffer(_block(size), dtype=like.dtype, count=count).view(rows, width)


def _is_ordinary(like: Tensor) -> bool:
    """Whether a tensor has memory, and no trace, mode or subclass of tensors replaces it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or type(like) not in (Tensor, nn.Parameter)
    )


def _block(size: int) -> mmap.mmap:
    """The smallest idle block that fits and is at most twice as large, else a new one."""
    with _lock:
        idle = sorted((blocks[i] for i in range(len(blocks)) if _is_idle(i)), key=len)
        for block in idle:
            if size <= len(block) <= 2 * size:
                return block
        excess = sum(map(len, idle)) - _MAX_IDLE_BYTES
        for block in idle:
            if excess > 0:
                excess -= len(block)
                blocks.remove(block)
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        blocks.append(block)
        return block


def _is_idle(index: int) -> bool:
    return _reference_count(blocks, index) == _IDLE_COUNT


def _reference_count(blocks: list[mmap.mmap], index: int) -> int:
    return sys.getrefcount(blocks[index])


# Reference count of a block that only the list references; a tensor in the block adds one.
_IDLE_COUNT = _reference_count([mmap.mmap(-1, 1)], 0)
