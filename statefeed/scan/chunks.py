"""Chunks of time for the Triton kernels: their number, the launch grid, and the rows of a step.

a chunk as a whole     carry_out = A carry_in + B          the first pass computes (A, B) of all chunks in parallel
carry into chunk c     the (A, B) of the chunks before it, composed              the second pass runs every chunk
dependent steps        T with one chunk;  2 T / C + C with C chunks
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs per multiprocessor: enough to hide memory latency when each program prefetches two steps.
_PROGRAMS = 8
# Cost of the second launch and its prologue, in dependent steps of just under a microsecond.
_LAUNCH = 16


class Launch(NamedTuple):
    """Launch grid for B * H lanes over T steps.

    Attributes:
        lanes: lanes of one program.
        steps: steps of one chunk.
        grid: (blocks of lanes, chunks of time).
    """

    lanes: int
    steps: int
    grid: tuple[int, int]


def launch(T: int, lanes: int, like: Tensor) -> Launch:
    """Launch grid for T steps of B * H lanes; ``like`` gives the device and the dtype of the inputs.

    A program has 128 threads, and every thread reads four bytes of a step (one or two units), so that the loads of a
    warp form one memory access, which can be issued ahead.
    """
    per_program = 256 if like.element_size() == 2 else 128
    blocks = math.ceil(lanes / per_program)
    length = steps(T, blocks, like.device)
    return Launch(per_program, length, (blocks, math.ceil(T / length)))


def steps(T: int, blocks: int, device: torch.device) -> int:
    """Steps per chunk; T if chunks bring no gain.

    There are as many chunks as the device runs at once, up to sqrt(2 T), where the number of dependent steps is
    smallest. Chunks are used only if they reduce the number of dependent steps.

    Args:
        T: steps of the sequence.
        blocks: programs of one chunk.
        device: the CUDA device; a CPU (Triton's interpreter) counts as one multiprocessor.
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
    """Whether units can be read in pairs: H and the offset and stride of every row are even.

    Triton detects alignment only in multiples of 16. Without this hint, half-precision rows with, say, H = 650 are read
    two bytes at a time, and such loads cannot be issued ahead.
    """
    return H % 2 == 0 and all(t is None or (t.stride(0) % 2 == 0 and t.storage_offset() % 2 == 0) for t in tensors)


@triton.jit
def even(n, PAIRS: tl.constexpr):
    """n; with PAIRS, in a form that shows the compiler that n is even."""
    if PAIRS:
        n = (n // 2) * 2
    return n


@triton.jit
def lanes_of(B, H, LANES: tl.constexpr):
    """The lanes of a program: index, sequence, unit, and the mask of valid lanes."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    return lane, lane // H, lane % H, lane < B * H


@triton.jit
def row_at(t, b, B, offsets, mask):
    """The rows of sequences b at time t, and the mask of valid rows; without offsets all are valid."""
    row = tl.cast(t, tl.int64) * B + b
    in_bounds = mask
    if offsets is not None:
        offset = tl.load(offsets + t)
        row = offset + b
        in_bounds = mask & (b < tl.load(offsets + t + 1) - offset)
    return row, in_bounds


@triton.jit
def scaled(carry, factor):
    """factor * carry, and 0 where carry is 0: the product of a chunk's diagonal may overflow although no state does."""
    return tl.where(carry == 0, 0, factor * carry)
