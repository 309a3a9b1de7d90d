"""Chunks of time for the Triton kernels: how many, how a launch is laid out, and where the rows of a step are.

a chunk as a whole     carry_out = A carry_in + B          one pass finds (A, B) of every chunk, all at once
carry into chunk c     the (A, B) of the chunks before it, folded                a second pass runs every chunk
dependent steps        T in one chunk;  2 T / C + C in C of them
"""

from __future__ import annotations

import functools
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


class Launch(NamedTuple):
    """How B * H lanes over T steps become programs.

    Attributes:
        lanes: lanes of one program.
        steps: steps of one chunk.
        grid: (blocks of lanes, chunks of time).
    """

    lanes: int
    steps: int
    grid: tuple[int, int]


def launch(T: int, lanes: int, like: Tensor) -> Launch:
    """How to launch T steps of B * H lanes; ``like`` gives the device, and the dtype of what is read.

    A program has 128 threads, and every thread four bytes of a step, one unit or two: a warp's loads make one access to
    memory, of four bytes per thread, which can be issued ahead.
    """
    per_program = 256 if like.element_size() == 2 else 128
    blocks = math.ceil(lanes / per_program)
    length = steps(T, blocks, like.device)
    return Launch(per_program, length, (blocks, math.ceil(T / length)))


def steps(T: int, blocks: int, device: torch.device) -> int:
    """How many steps a chunk has, T where chunks gain nothing.

    As many chunks as the device runs at once, but not more than sqrt(2 T), where the dependent steps are fewest, and
    only if they are fewer than without chunks.

    Args:
        T: steps of the sequence.
        blocks: programs of one chunk.
        device: whose multiprocessors count; a CPU, under Triton's interpreter, counts as one.
    """
    at_once = multiprocessors(device) * _PROGRAMS // max(blocks, 1)
    count = max(min(at_once, math.isqrt(2 * T)), 1)
    length = math.ceil(T / count)
    return length if 2 * length + count + _LAUNCH < T else max(T, 1)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which kernels compute: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def pairs(H: int, *tensors: Tensor | None) -> bool:
    """Whether units can be read two at a time: H is even, and so is every row's offset and stride.

    Triton finds alignment only in multiples of 16; without this, half-precision rows of, say, H = 650 are read two
    bytes at a time, which cannot be issued ahead.
    """
    return H % 2 == 0 and all(t is None or (t.stride(0) % 2 == 0 and t.storage_offset() % 2 == 0) for t in tensors)


@triton.jit
def even(n, PAIRS: tl.constexpr):
    """n itself; under PAIRS in a form that tells the compiler that n is even."""
    if PAIRS:
        n = (n // 2) * 2
    return n


@triton.jit
def lanes_of(B, H, LANES: tl.constexpr):
    """The lanes of a program: index, sequence, unit, and which of them exist."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    return lane, lane // H, lane % H, lane < B * H


@triton.jit
def row_at(t, b, B, offsets, mask):
    """The rows of sequences b at time t, and which of them exist: all, if no step has an offset."""
    row = tl.cast(t, tl.int64) * B + b
    in_bounds = mask
    if offsets is not None:
        offset = tl.load(offsets + t)
        row = offset + b
        in_bounds = mask & (b < tl.load(offsets + t + 1) - offset)
    return row, in_bounds


@triton.jit
def scaled(carry, factor):
    """factor * carry, and 0 where carry is 0: the product of a chunk's diagonal may overflow where no state does."""
    return tl.where(carry == 0, 0, factor * carry)
