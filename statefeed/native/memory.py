"""Memory for what lies between forward and backward, kept from step to step: fresh pages cost as much as filling them.

Only for what never leaves this package: a tensor on such memory cannot be resized, as an ordinary one can.
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor

_SMALLEST = 1 << 18  # bytes; below, the allocator of the process does as well
_KEPT = 1 << 27  # bytes that may lie idle
_blocks: list[mmap.mmap] = []
_lock = threading.Lock()


def empty(rows: int, width: int, like: Tensor) -> Tensor:
    """An uninitialised (rows, width) tensor of the dtype of ``like``, on memory that is free again when it dies."""
    count = rows * width
    size = count * like.element_size()
    if size < _SMALLEST or sys.platform == "win32" or torch.compiler.is_compiling():
        return like.new_empty(rows, width)
    return torch.frombuffer(_block(size), dtype=like.dtype, count=count).view(rows, width)


def _block(size: int) -> mmap.mmap:
    """The smallest idle block that fits without wasting half of it, else a new one."""
    with _lock:
        idle = sorted((_blocks[i] for i in range(len(_blocks)) if _is_idle(i)), key=len)
        for block in idle:
            if size <= len(block) <= 2 * size:
                return block
        spare = sum(map(len, idle)) - _KEPT
        for block in idle:
            if spare > 0:
                spare -= len(block)
                _blocks.remove(block)
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        _blocks.append(block)
        return block


def _is_idle(index: int) -> bool:
    return _references(_blocks, index) == _ALONE


def _references(blocks: list[mmap.mmap], index: int) -> int:
    return sys.getrefcount(blocks[index])


# What this Python counts where only the list holds a block: a tensor on it would be one more.
_ALONE = _references([mmap.mmap(-1, 1)], 0)
