"""Triton method: y[t] = a[t] y[t-1] + x[t] in one pass over memory, or two passes if time is split into chunks.

chunk (t0 .. t1]      A = a[t1] ... a[t0+1],   B = y[t1] from y[t0] = 0
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statefeed.scan import chunks
from statefeed.scan.chunks import lanes_of, row_at, scaled


def scan(x: Tensor, a: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """Compute the states of a diagonal linear recurrence.

    Args:
        x: (T, ..., S), float32 or float64.
        a: (S,) or the shape of x.
        initial: state before the first step, (..., S); zero if None.
        reverse: run from T - 1 down to 0.

    Returns:
        y, the shape of x.

    Gradient: none; ``statefeed.scan`` differentiates it.

    Cost: per step and unit, 2 values read and 1 written; with chunks 4 read and 1 written. A stationary ``a`` saves one
        read per pass.
    """
    y: Tensor = torch.ops.statefeed.triton_scan(x, a, initial, reverse)
    return y


def _scan(x: Tensor, a: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        with device_of(x):
            start = None if initial is None else initial.contiguous()
            B, S = y.numel() // (len(x) * x.shape[-1]), x.shape[-1]
            solve(
                dense_step, x.contiguous(), a.contiguous(), start, None, y, (len(x), B, S), reverse, a.dim() == 1, False
            )
    return y


def solve(
    step: Any,
    x: Tensor,
    a: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    y: Tensor,
    sizes: tuple[int, int, int],
    reverse: bool,
    stationary: bool,
    before: bool,
) -> None:
    """Launch the kernels of a scan and write y.

    Args:
        step: Triton function ``(x, a, row, unit, H, mask, STATIONARY, ACC)`` that returns the factor and the input of
            a row.
        x, a: inputs of ``step``.
        initial: state before the first step, (B, H).
        offsets: first row of every step and the end of the last step, (T + 1,), int64; None if all steps have B rows.
        y: (N, H), overwritten.
        sizes: T, B, H.
        reverse: run from T - 1 down to 0.
        stationary: passed to ``step``.
        before: write the state before each step instead of the state after it.
    """
    T, B, H = sizes
    lanes, length, grid = chunks.launch(T, B * H, x)
    constants = {
        "STEP": step, "REVERSE": reverse, "STATIONARY": stationary, "BEFORE": before,
        "PAIRS": chunks.pairs(H), "ACC": chunks.accumulator(y.dtype), "LANES": lanes,
    }  # fmt: skip
    summary = y.new_empty((grid[1], 2, B * H)) if grid[1] > 1 else None
    if summary is not None:
        _summarize[grid](x, a, offsets, summary, T, B, H, length, **constants)
    _run[grid](x, a, initial, offsets, summary, y, T, B, H, length, **constants)


def device_of(tensor: Tensor) -> Any:
    """Context in which kernels launch on the device of a tensor; it has no effect on a CPU (Triton's interpreter)."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


@triton.jit
def dense_step(x, a, row, unit, H, mask, STATIONARY: tl.constexpr, ACC: tl.constexpr):
    """Factor and input of one row of ``scan``."""
    at = a + unit if STATIONARY else a + row * H + unit
    return tl.load(at, mask, 0).to(ACC), tl.load(x + row * H + unit, mask, 0).to(ACC)


@triton.jit(do_not_specialize=["T", "B", "length"])
def _summarize(
    x, a, offsets, summary, T, B, H, length,
    STEP: tl.constexpr, REVERSE: tl.constexpr, STATIONARY: tl.constexpr, BEFORE: tl.constexpr, PAIRS: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Summary of a chunk: the product of its factors, and its last state when it starts from zero."""
    H = chunks.even(H, PAIRS)
    lane, b, unit, mask = lanes_of(B, H, LANES)
    chunk = tl.program_id(1)
    product = tl.full([LANES], 1, ACC)
    state = tl.full([LANES], 0, ACC)
    for s in tl.range(chunk * length, tl.minimum(chunk * length + length, T), num_stages=3):
        t = T - 1 - s if REVERSE else s
        row, in_bounds = row_at(t, b, B, offsets, mask)
        factor, added = STEP(x, a, row, unit, H, in_bounds, STATIONARY, ACC)
        # After an overflow, a zero factor must reset the product to zero, as it resets the state.
        product = tl.where(in_bounds, scaled(factor, product), product)
        state = tl.where(in_bounds, factor * state + added, state)
    at = summary + chunk * 2 * (B * H).to(tl.int64) + lane
    tl.store(at, product, mask)
    tl.store(at + B * H, state, mask)


@triton.jit(do_not_specialize=["T", "B", "length"])
def _run(
    x, a, initial, offsets, summary, y, T, B, H, length,
    STEP: tl.constexpr, REVERSE: tl.constexpr, STATIONARY: tl.constexpr, BEFORE: tl.constexpr, PAIRS: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Run a chunk from the state before it, composed from the summaries of the earlier chunks."""
    H = chunks.even(H, PAIRS)
    lane, b, unit, mask = lanes_of(B, H, LANES)
    chunk = tl.program_id(1)
    state = tl.full([LANES], 0, ACC)
    if initial is not None:
        state = tl.load(initial + lane, mask, 0).to(ACC)
    if summary is not None:
        for before in tl.range(0, chunk):
            at = summary + before * 2 * (B * H).to(tl.int64) + lane
            state = scaled(state, tl.load(at, mask, 0)) + tl.load(at + B * H, mask, 0)
    for s in tl.range(chunk * length, tl.minimum(chunk * length + length, T), num_stages=3):
        t = T - 1 - s if REVERSE else s
        row, in_bounds = row_at(t, b, B, offsets, mask)
        factor, added = STEP(x, a, row, unit, H, in_bounds, STATIONARY, ACC)
        at = y + row * H + unit
        if BEFORE:
            tl.store(at, state, in_bounds)
        state = tl.where(in_bounds, factor * state + added, state)
        if not BEFORE:
            tl.store(at, state, in_bounds)


_LIBRARY = torch.library.Library("statefeed", "FRAGMENT")
_LIBRARY.define("triton_scan(Tensor x, Tensor a, Tensor? initial, bool reverse) -> Tensor")
_LIBRARY.impl("triton_scan", _scan, "CompositeExplicitAutograd")
_FAKE = torch.library.register_fake("statefeed::triton_scan", lib=_LIBRARY)


@_FAKE
def _scan_fake(x: Tensor, a: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
