"""A backward pass over time: every row's gradients at its gates from what comes from the step after it.

    delta = e + carry,   d = k delta,   carry' = D delta + residual
    an LSTM besides      gamma = emit delta + carry_c,   carry_c' = D_c gamma + residual_c

One program runs one chunk of time for a block of units, back to front; rows of a packed batch that have ended are
passed over.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statefeed.backends.triton.cells import factors
from statefeed.scan.chunks import row_at


@triton.jit(do_not_specialize=["T", "B", "length"])
def summarise(
    gates, extra, state, own, offsets, e, residual, summary, T, B, H, length,
    CELL: tl.constexpr, RULE: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A chunk as a map of what reaches its last step: carry_h = a h + u; an LSTM's carry_c = m h + p c + v besides."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    chunk = tl.program_id(1)
    b, unit, lives = lane // H, lane % H, lane < B * H
    own0 = tl.load(own + unit)
    own1 = tl.load(own + H + unit)
    own2 = tl.load(own + 2 * H + unit)
    own3 = tl.load(own + 3 * H + unit)
    a = tl.full([LANES], 1, WIDE)
    p = tl.full([LANES], 1, WIDE)
    u = tl.full([LANES], 0, WIDE)
    v = tl.full([LANES], 0, WIDE)
    m = tl.full([LANES], 0, WIDE)
    stop = tl.minimum(chunk * length + length, T)
    for s in tl.range(chunk * length, stop, num_stages=3):
        t = stop - 1 - (s - chunk * length)
        row, inside = row_at(t, b, B, offsets, lives)
        _, _, _, _, _, emit, D_h, D_c = factors(
            gates, extra, state, own0, own1, own2, own3, row, unit, H, inside, CELL, RULE, WIDE
        )
        delta = u + tl.load(e + row * H + unit, inside, 0).to(WIDE)
        if CELL == "lstm":
            below = D_c * (emit * delta + v)
            if residual is not None:
                below += tl.load(residual + row * (2 * H) + H + unit, inside, 0)
            v = tl.where(inside, below, v)
            m = tl.where(inside, D_c * (emit * a + m), m)
            p = tl.where(inside, D_c * p, p)
        below = D_h * delta
        if residual is not None:
            below += tl.load(residual + row * (2 * H if CELL == "lstm" else H) + unit, inside, 0)
        u = tl.where(inside, below, u)
        a = tl.where(inside, D_h * a, a)
    lanes = tl.cast(B, tl.int64) * H
    at = summary + chunk * lanes * (5 if CELL == "lstm" else 2) + lane
    tl.store(at, a, lives)
    tl.store(at + lanes, u, lives)
    if CELL == "lstm":
        tl.store(at + 2 * lanes, m, lives)
        tl.store(at + 3 * lanes, p, lives)
        tl.store(at + 4 * lanes, v, lives)


@triton.jit(do_not_specialize=["T", "B", "length"])
def run(
    gates, extra, state, own, offsets, e, final_e, residual, summary, next_residual, d, d_q, sums, first,
    T, B, H, length,
    CELL: tl.constexpr, RULE: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A chunk from what reaches its last step: the gradients at its gates, their sums, what leaves its first step."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    chunk = tl.program_id(1)
    b, unit, lives = lane // H, lane % H, lane < B * H
    lanes = tl.cast(B, tl.int64) * H
    own0 = tl.load(own + unit)
    own1 = tl.load(own + H + unit)
    own2 = tl.load(own + 2 * H + unit)
    own3 = tl.load(own + 3 * H + unit)
    STATES: tl.constexpr = 2 if CELL == "lstm" else 1
    ends = b * (STATES * H) + unit
    carry = tl.load(final_e + ends, lives, 0)
    carry_c = tl.full([LANES], 0, WIDE)
    if CELL == "lstm":
        carry_c = tl.load(final_e + ends + H, lives, 0)
    if summary is not None:
        for s in tl.range(0, tl.num_programs(1) - 1 - chunk):
            at = summary + (tl.num_programs(1) - 1 - s) * lanes * (5 if CELL == "lstm" else 2) + lane
            if CELL == "lstm":
                carry_c = (
                    tl.load(at + 2 * lanes, lives, 0) * carry
                    + tl.load(at + 3 * lanes, lives, 0) * carry_c
                    + tl.load(at + 4 * lanes, lives, 0)
                )
            carry = tl.load(at, lives, 0) * carry + tl.load(at + lanes, lives, 0)
    sum0 = tl.full([LANES], 0, WIDE)
    sum1 = tl.full([LANES], 0, WIDE)
    sum2 = tl.full([LANES], 0, WIDE)
    sum3 = tl.full([LANES], 0, WIDE)
    stop = tl.minimum(chunk * length + length, T)
    for s in tl.range(chunk * length, stop, num_stages=3):
        t = stop - 1 - (s - chunk * length)
        row, inside = row_at(t, b, B, offsets, lives)
        k0, k1, k2, k3, direct, emit, D_h, D_c = factors(
            gates, extra, state, own0, own1, own2, own3, row, unit, H, inside, CELL, RULE, WIDE
        )
        delta = carry + tl.load(e + row * H + unit, inside, 0).to(WIDE)
        passed = row * (STATES * H) + unit
        below = D_h * delta
        if residual is not None:
            below += tl.load(residual + passed, inside, 0)
        if next_residual is not None:
            tl.store(next_residual + passed, (direct - D_h) * delta if CELL == "gru" else -D_h * delta, inside)
        carry = tl.where(inside, below, carry)
        if CELL == "lstm":
            gamma = emit * delta + carry_c
            below_c = D_c * gamma
            if residual is not None:
                below_c += tl.load(residual + passed + H, inside, 0)
            if next_residual is not None:
                tl.store(next_residual + passed + H, (direct - D_c) * gamma, inside)
            carry_c = tl.where(inside, below_c, carry_c)
            at = d + row * (4 * H) + unit
            d0, d1, d2, d3 = k0 * gamma, k1 * gamma, k2 * gamma, k3 * delta
            tl.store(at + 3 * H, d3, inside)
        else:
            d0, d1, d2, d3 = k0 * delta, k1 * delta, k2 * delta, k3 * delta
            at = d + row * (3 * H if CELL == "gru" else H) + unit
            if CELL == "gru":
                tl.store(d_q + row * H + unit, d3, inside)
        tl.store(at, d0, inside)
        if CELL == "lstm" or CELL == "gru":
            tl.store(at + H, d1, inside)
            tl.store(at + 2 * H, d2, inside)
        if sums is not None:
            sum0 += tl.where(inside, d0, 0)
            sum1 += tl.where(inside, d1, 0)
            sum2 += tl.where(inside, d2, 0)
            sum3 += tl.where(inside, d3, 0)
    if chunk == 0:
        tl.store(first + ends, carry, lives)
        if CELL == "lstm":
            tl.store(first + ends + H, carry_c, lives)
    if sums is not None:
        GATED: tl.constexpr = CELL == "lstm" or CELL == "gru"
        at = sums + ((tl.cast(chunk, tl.int64) * B + b) * (4 * H if GATED else H)) + unit
        tl.store(at, sum0, lives)
        if GATED:
            tl.store(at + H, sum1, lives)
            tl.store(at + 2 * H, sum2, lives)
            tl.store(at + 3 * H, sum3, lives)


@triton.jit(do_not_specialize=["T", "B", "length"])
def add_jacobians(
    gates, extra, state, own, offsets, sums, T, B, H, length,
    CELL: tl.constexpr, RULE: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The diagonal of the Jacobian, summed over a chunk."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    chunk = tl.program_id(1)
    b, unit, lives = lane // H, lane % H, lane < B * H
    own0 = tl.load(own + unit)
    own1 = tl.load(own + H + unit)
    own2 = tl.load(own + 2 * H + unit)
    own3 = tl.load(own + 3 * H + unit)
    sum_h = tl.full([LANES], 0, WIDE)
    sum_c = tl.full([LANES], 0, WIDE)
    for t in tl.range(chunk * length, tl.minimum(chunk * length + length, T), num_stages=3):
        row, inside = row_at(t, b, B, offsets, lives)
        _, _, _, _, _, _, D_h, D_c = factors(
            gates, extra, state, own0, own1, own2, own3, row, unit, H, inside, CELL, RULE, WIDE
        )
        sum_h += tl.where(inside, D_h, 0)
        sum_c += tl.where(inside, D_c, 0)
    STATES: tl.constexpr = 2 if CELL == "lstm" else 1
    at = sums + (tl.cast(chunk, tl.int64) * B + b) * (STATES * H) + unit
    tl.store(at, sum_h, lives)
    if CELL == "lstm":
        tl.store(at + H, sum_c, lives)
