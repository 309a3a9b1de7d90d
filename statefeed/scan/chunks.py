"""How time is cut into chunks, so that a few units over many steps still fill the chip.

a chunk as a whole     carry_out = A carry_in + B          one pass finds (A, B) of every chunk, all at once
carry into chunk c     the (A, B) of the chunks before it, folded                a second pass runs every chunk
dependent steps        T in one chunk;  2 T / C + C in C of them
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of one multiprocessor: with two steps' loads under way ahead of each, what hides the latency of memory.
_PROGRAMS = 8
# The second launch and its prologue, in dependent steps of somewhat under a microsecond.
_LAUNCH = 16


class Cut(NamedTuple):
    """How B * H lanes over T steps become programs: (blocks of units, chunks of time)."""

    units: int
    steps: int
    grid: tuple[int, int]


def cut(T: int, lanes: int, like: Tensor) -> Cut:
    """How to launch T steps of B * H lanes; ``like`` gives the device, and the dtype of what is read.

    A program has 128 threads, and every thread four bytes of a step, one unit or two: a warp's loads make one access to
    memory, and are wide enough to be issued ahead.
    """
    units = 256 if like.element_size() == 2 else 128
    blocks = math.ceil(lanes / units)
    length = steps(T, blocks, like.device)
    return Cut(units, length, (blocks, math.ceil(T / length)))


def steps(T: int, blocks: int, device: torch.device) -> int:
    """How many steps a chunk has, T where cutting gains nothing.

    As many chunks as the chip has room for beside one another, but not more than sqrt(2 T), where the dependent steps
    are fewest, and only if they are fewer than without chunks.

    Args:
        T: steps of the sequence.
        blocks: programs of one chunk.
        device: whose multiprocessors count; a CPU, under Triton's interpreter, counts as one.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    room = processors * _PROGRAMS // max(blocks, 1)
    count = max(min(room, math.isqrt(2 * T)), 1)
    length = math.ceil(T / count)
    return length if 2 * length + count + _LAUNCH < T else max(T, 1)


@triton.jit
def row_at(t, b, B, offsets, lives):
    """Where the rows of sequences b lie at step t, and which of them are there: all, if no step has an offset."""
    row = tl.cast(t, tl.int64) * B + b
    inside = lives
    if offsets is not None:
        offset = tl.load(offsets + t)
        row = offset + b
        inside = lives & (b < tl.load(offsets + t + 1) - offset)
    return row, inside
