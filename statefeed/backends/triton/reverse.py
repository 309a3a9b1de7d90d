"""Backward pass over time: the gradients at the gates of every row from the gradient of the next step.

    delta = e + carry,   d = k delta,   carry' = D delta + residual
    with a cell state    gamma = dh_dc delta + carry_c,   carry_c' = D_c gamma + residual_c

One program runs one chunk of time for a block of units, from the last processed step to the first. Rows that do not
exist at a step do not change the carry. With REVERSE a layer processes time from T - 1 down to 0. With PROJECTED ``e``
is the gradient at the output u of the cell, which no step feeds back; D, residuals and initial state are those of c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statefeed.backends.triton.rules import diagonals, stationary_diagonal, w_hh_diagonal
from statefeed.scan.chunks import even, lanes_of, row_at, scaled


@triton.jit(do_not_specialize=["T", "B", "length"])
def summarize(
    gates, saved, state, state_stride, w_hh, diagonal, offsets, e, e_stride, residual, summary, T, B, H, length,
    FACTORS: tl.constexpr, LOCAL: tl.constexpr, STATES: tl.constexpr, PROJECTED: tl.constexpr, GATES: tl.constexpr,
    RULE: tl.constexpr, REVERSE: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Summary of a chunk, a map of its incoming carry: carry_h = a h + u; with a cell state carry_c = m h + p c + v."""
    H = even(H, PAIRS)
    state_stride = even(state_stride, PAIRS)
    e_stride = even(e_stride, PAIRS)
    lane, b, unit, mask = lanes_of(B, H, LANES)
    chunk = tl.program_id(1)
    w0, w1, w2, w3 = w_hh_diagonal(w_hh, unit, H, GATES, RULE, ACC)
    fixed_h, fixed_c = stationary_diagonal(diagonal, unit, H, STATES, PROJECTED, RULE, ACC)
    a = tl.full([LANES], 1, ACC)
    p = tl.full([LANES], 1, ACC)
    u = tl.full([LANES], 0, ACC)
    v = tl.full([LANES], 0, ACC)
    m = tl.full([LANES], 0, ACC)
    stop = tl.minimum(chunk * length + length, T)
    for s in tl.range(chunk * length, stop, num_stages=3):
        step = stop - 1 - (s - chunk * length)
        t = T - 1 - step if REVERSE else step
        row, in_bounds = row_at(t, b, B, offsets, mask)
        _, _, _, _, direct_h, direct_c, dh_dc, jacobian_h, jacobian_c = FACTORS(
            gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, in_bounds, ACC
        )
        D_h, D_c = diagonals(
            direct_h, direct_c, jacobian_h, jacobian_c, fixed_h, fixed_c, diagonal, row, unit, H, in_bounds,
            STATES, PROJECTED, RULE, ACC,
        )  # fmt: skip
        delta = u
        if e is not None:
            delta += tl.load(e + row * e_stride + unit, in_bounds, 0).to(ACC)
        if STATES == 2:
            carry_c = D_c * (dh_dc * delta + v)
            if residual is not None:
                c_at = row * H + unit if PROJECTED else row * (2 * H) + H + unit
                carry_c += tl.load(residual + c_at, in_bounds, 0)
            v = tl.where(in_bounds, carry_c, v)
            # An overflowed product that meets a zero factor is zero again, as the carry is.
            m = tl.where(in_bounds, scaled(D_c, scaled(dh_dc, a) + m), m)
            p = tl.where(in_bounds, scaled(D_c, p), p)
        carry = D_h * delta
        if residual is not None and not PROJECTED:
            carry += tl.load(residual + row * (STATES * H) + unit, in_bounds, 0)
        u = tl.where(in_bounds, carry, u)
        a = tl.where(in_bounds, scaled(D_h, a), a)
    lanes = tl.cast(B, tl.int64) * H
    at = summary + chunk * lanes * (5 if STATES == 2 else 2) + lane
    tl.store(at, a, mask)
    tl.store(at + lanes, u, mask)
    if STATES == 2:
        tl.store(at + 2 * lanes, m, mask)
        tl.store(at + 3 * lanes, p, mask)
        tl.store(at + 4 * lanes, v, mask)


@triton.jit(do_not_specialize=["T", "B", "length"])
def run(
    gates, saved, state, state_stride, w_hh, diagonal, offsets, e, e_stride, final_h, final_c, residual, summary,
    next_residual, d, d_candidate, sums, initial_h, initial_c, T, B, H, length,
    FACTORS: tl.constexpr, LOCAL: tl.constexpr, STATES: tl.constexpr, PROJECTED: tl.constexpr, GATES: tl.constexpr,
    RULE: tl.constexpr, REVERSE: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A chunk from what reaches its last step: gradients at its gates, their sums, what leaves its first step."""
    H = even(H, PAIRS)
    state_stride = even(state_stride, PAIRS)
    e_stride = even(e_stride, PAIRS)
    lane, b, unit, mask = lanes_of(B, H, LANES)
    chunk = tl.program_id(1)
    lanes = tl.cast(B, tl.int64) * H
    w0, w1, w2, w3 = w_hh_diagonal(w_hh, unit, H, GATES, RULE, ACC)
    fixed_h, fixed_c = stationary_diagonal(diagonal, unit, H, STATES, PROJECTED, RULE, ACC)
    carry = tl.full([LANES], 0, ACC)
    carry_c = tl.full([LANES], 0, ACC)
    if final_h is not None:
        carry = tl.load(final_h + lane, mask, 0).to(ACC)
    if final_c is not None:
        carry_c = tl.load(final_c + lane, mask, 0).to(ACC)
    if summary is not None:
        for s in tl.range(0, tl.num_programs(1) - 1 - chunk):
            at = summary + (tl.num_programs(1) - 1 - s) * lanes * (5 if STATES == 2 else 2) + lane
            if STATES == 2:
                carry_c = (
                    scaled(carry, tl.load(at + 2 * lanes, mask, 0))
                    + scaled(carry_c, tl.load(at + 3 * lanes, mask, 0))
                    + tl.load(at + 4 * lanes, mask, 0)
                )
            carry = scaled(carry, tl.load(at, mask, 0)) + tl.load(at + lanes, mask, 0)
    sum0 = tl.full([LANES], 0, ACC)
    sum1 = tl.full([LANES], 0, ACC)
    sum2 = tl.full([LANES], 0, ACC)
    sum3 = tl.full([LANES], 0, ACC)
    stop = tl.minimum(chunk * length + length, T)
    for s in tl.range(chunk * length, stop, num_stages=3):
        step = stop - 1 - (s - chunk * length)
        t = T - 1 - step if REVERSE else step
        row, in_bounds = row_at(t, b, B, offsets, mask)
        k0, k1, k2, k3, direct_h, direct_c, dh_dc, jacobian_h, jacobian_c = FACTORS(
            gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, in_bounds, ACC
        )
        D_h, D_c = diagonals(
            direct_h, direct_c, jacobian_h, jacobian_c, fixed_h, fixed_c, diagonal, row, unit, H, in_bounds,
            STATES, PROJECTED, RULE, ACC,
        )  # fmt: skip
        delta = carry
        if e is not None:
            delta += tl.load(e + row * e_stride + unit, in_bounds, 0).to(ACC)
        gamma = dh_dc * delta + carry_c
        state_at = row * (STATES * H) + unit
        next_carry = D_h * delta
        if residual is not None and not PROJECTED:
            next_carry += tl.load(residual + state_at, in_bounds, 0)
        if next_residual is not None and not PROJECTED:
            tl.store(next_residual + state_at, (direct_h - D_h) * delta, in_bounds)
        carry = tl.where(in_bounds, next_carry, carry)
        if STATES == 2:
            next_carry_c = D_c * gamma
            c_at = row * H + unit if PROJECTED else state_at + H
            if residual is not None:
                next_carry_c += tl.load(residual + c_at, in_bounds, 0)
            if next_residual is not None:
                tl.store(next_residual + c_at, (direct_c - D_c) * gamma, in_bounds)
            carry_c = tl.where(in_bounds, next_carry_c, carry_c)
        d0, d1, d2, d3 = LOCAL(k0, k1, k2, k3, delta, gamma)
        at = d + row * (GATES * H) + unit
        tl.store(at, d0, in_bounds)
        if GATES > 1:
            tl.store(at + H, d1, in_bounds)
            tl.store(at + 2 * H, d2, in_bounds)
        if GATES == 4:
            tl.store(at + 3 * H, d3, in_bounds)
        if d_candidate is not None:
            tl.store(d_candidate + row * H + unit, d3, in_bounds)
        if sums is not None:
            sum0 += tl.where(in_bounds, d0, 0)
            sum1 += tl.where(in_bounds, d1, 0)
            sum2 += tl.where(in_bounds, d2, 0)
            sum3 += tl.where(in_bounds, d3, 0)
    if chunk == 0:
        if not PROJECTED:
            tl.store(initial_h + lane, carry, mask)
        if STATES == 2:
            tl.store(initial_c + lane, carry_c, mask)
    if sums is not None:
        at = sums + ((tl.cast(chunk, tl.int64) * B + b) * (4 * H if GATES > 1 else H)) + unit
        tl.store(at, sum0, mask)
        if GATES > 1:
            tl.store(at + H, sum1, mask)
            tl.store(at + 2 * H, sum2, mask)
            tl.store(at + 3 * H, sum3, mask)


@triton.jit(do_not_specialize=["T", "B", "length"])
def add_jacobians(
    gates, saved, state, state_stride, w_hh, offsets, sums, T, B, H, length,
    FACTORS: tl.constexpr, LOCAL: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr,
    PAIRS: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The diagonal of the Jacobian, summed over a chunk."""
    H = even(H, PAIRS)
    state_stride = even(state_stride, PAIRS)
    _lane, b, unit, mask = lanes_of(B, H, LANES)
    chunk = tl.program_id(1)
    w0, w1, w2, w3 = w_hh_diagonal(w_hh, unit, H, GATES, "jacobian", ACC)
    sum_h = tl.full([LANES], 0, ACC)
    sum_c = tl.full([LANES], 0, ACC)
    for t in tl.range(chunk * length, tl.minimum(chunk * length + length, T), num_stages=3):
        row, in_bounds = row_at(t, b, B, offsets, mask)
        _, _, _, _, _, _, _, jacobian_h, jacobian_c = FACTORS(
            gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, in_bounds, ACC
        )
        sum_h += tl.where(in_bounds, jacobian_h, 0)
        sum_c += tl.where(in_bounds, jacobian_c, 0)
    at = sums + (tl.cast(chunk, tl.int64) * B + b) * (STATES * H) + unit
    tl.store(at, sum_h, mask)
    if STATES == 2:
        tl.store(at + H, sum_c, mask)
