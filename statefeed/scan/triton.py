"""y[t] = a[t] y[t-1] + x[t] in one pass over memory, in two where time is cut into chunks; an LSTM's c likewise.

chunk (t0 .. t1]      A = a[t1] ... a[t0+1],   B = y[t1] from y[t0] = 0
LSTM                  a = f, x = i g, from the pre-activations of the gates; what is written is c before each step
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statefeed.scan import chunks
from statefeed.scan.chunks import row_at

WIDE = {torch.float64: tl.float64}


def scan(x: Tensor, a: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """The states of a diagonal linear recurrence.

    Args:
        x: (T, ..., S), float32 or float64.
        a: (S,) or the shape of x.
        initial: state before the first step, (..., S); zero if None.
        reverse: from T - 1 down to 0.

    Returns:
        y, the shape of x.

    Gradient: none by itself; ``statefeed.scan`` differentiates it.

    Cost: 2 numbers a step and unit read and 1 written, 4 and 1 in chunks; 1 less each where a is stationary.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    start = None if initial is None else initial.contiguous()
    _scan(x.contiguous(), a.contiguous(), start, None, y, len(x), x.shape[-1], reverse, False)
    return y


def cell_states(gates: Tensor, initial: Tensor, offsets: Tensor | None) -> Tensor:
    """An LSTM's c before every step.

    Args:
        gates: pre-activations of i, f, g and o, (N, 4 * H).
        initial: c before the first step, (B, H), float32 or float64.
        offsets: the first row of every step and their end, (T + 1,), int64; None if all steps have B rows.

    Returns:
        (N, H), dtype as ``initial``.

    Gradient: none.

    Cost: 3 numbers a row and unit read and 1 written, 6 and 1 in chunks.
    """
    c = initial.new_empty(len(gates), initial.shape[1])
    T = len(gates) // max(len(initial), 1) if offsets is None else len(offsets) - 1
    _scan(gates, None, initial, offsets, c, T, initial.shape[1], False, True)
    return c


@torch.library.custom_op("statefeed::triton_scan", mutates_args=("y",))
def _scan(
    x: Tensor,
    a: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    y: Tensor,
    T: int,
    H: int,
    reverse: bool,
    lstm: bool,
) -> None:
    if not y.numel():
        return
    B = len(initial) if lstm and initial is not None else y.numel() // (T * H)
    units, length, grid = chunks.cut(T, B * H, x)
    constants = {
        "REVERSE": reverse,
        "LSTM": lstm,
        "STATIONARY": a is not None and a.dim() == 1,
        "WIDE": WIDE.get(y.dtype, tl.float32),
        "LANES": units,
    }
    summary = y.new_empty((grid[1], 2, B * H)) if grid[1] > 1 else None
    if summary is not None:
        _summarise[grid](x, a, offsets, summary, T, B, H, length, **constants)
    _run[grid](x, a, initial, offsets, summary, y, T, B, H, length, **constants)


@triton.jit
def _pair(x, a, row, unit, H, inside, LSTM: tl.constexpr, STATIONARY: tl.constexpr, WIDE: tl.constexpr):
    """(a, x) of one step."""
    if LSTM:
        gates = x + row * (4 * H) + unit
        i = 1 / (1 + tl.exp(-tl.load(gates, inside, 0).to(WIDE)))
        factor = 1 / (1 + tl.exp(-tl.load(gates + H, inside, 0).to(WIDE)))
        fed = i * (2 / (1 + tl.exp(-2 * tl.load(gates + 2 * H, inside, 0).to(WIDE))) - 1)
    else:
        fed = tl.load(x + row * H + unit, inside, 0).to(WIDE)
        if STATIONARY:
            factor = tl.load(a + unit, inside, 0).to(WIDE)
        else:
            factor = tl.load(a + row * H + unit, inside, 0).to(WIDE)
    return factor, fed


@triton.jit(do_not_specialize=["T", "B", "length"])
def _summarise(
    x, a, offsets, summary, T, B, H, length,
    REVERSE: tl.constexpr, LSTM: tl.constexpr, STATIONARY: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    chunk = tl.program_id(1)
    b, unit, lives = lane // H, lane % H, lane < B * H
    product = tl.full([LANES], 1, WIDE)
    state = tl.full([LANES], 0, WIDE)
    for s in tl.range(chunk * length, tl.minimum(chunk * length + length, T), num_stages=3):
        t = T - 1 - s if REVERSE else s
        row, inside = row_at(t, b, B, offsets, lives)
        factor, fed = _pair(x, a, row, unit, H, inside, LSTM, STATIONARY, WIDE)
        product = tl.where(inside, product * factor, product)
        state = tl.where(inside, factor * state + fed, state)
    at = summary + chunk * 2 * (B * H).to(tl.int64) + lane
    tl.store(at, product, lives)
    tl.store(at + B * H, state, lives)


@triton.jit(do_not_specialize=["T", "B", "length"])
def _run(
    x, a, initial, offsets, summary, y, T, B, H, length,
    REVERSE: tl.constexpr, LSTM: tl.constexpr, STATIONARY: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    chunk = tl.program_id(1)
    b, unit, lives = lane // H, lane % H, lane < B * H
    state = tl.full([LANES], 0, WIDE)
    if initial is not None:
        state = tl.load(initial + lane, lives, 0).to(WIDE)
    if summary is not None:
        for before in tl.range(0, chunk):
            at = summary + before * 2 * (B * H).to(tl.int64) + lane
            state = tl.load(at, lives, 0) * state + tl.load(at + B * H, lives, 0)
    for s in tl.range(chunk * length, tl.minimum(chunk * length + length, T), num_stages=3):
        t = T - 1 - s if REVERSE else s
        row, inside = row_at(t, b, B, offsets, lives)
        factor, fed = _pair(x, a, row, unit, H, inside, LSTM, STATIONARY, WIDE)
        at = y + row * H + unit
        if LSTM:
            tl.store(at, state, inside)
        state = tl.where(inside, factor * state + fed, state)
        if not LSTM:
            tl.store(at, state, inside)
