"""Backward pass over time: the gradients at the gates of every row from the gradient of the next step.

    delta = e + carry,   d = k delta,   carry' = D delta + residual
    with a cell state    gamma_c = dh_dc delta + carry_c,   carry_c' = D_c gamma_c + residual_c, and so on for n

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
    HEAD: tl.constexpr, RULE: tl.constexpr, REVERSE: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Summary of a chunk, a map of its incoming carry: carry_h = a h + u; with a cell state carry_c = m h + p c + v.

    A third part n has an m, p and v of its own.
    """
    H = even(H, PAIRS)
    state_stride = even(state_stride, PAIRS)
    e_stride = even(e_stride, PAIRS)
    lane, b, unit, mask = lanes_of(B, H, LANES)
    chunk = tl.program_id(1)
    w0, w1, w2, w3 = w_hh_diagonal(w_hh, unit, H, GATES, HEAD, RULE, ACC)
    fixed = stationary_diagonal(diagonal, unit, H, STATES, PROJECTED, RULE, ACC)
    a = tl.full([LANES], 1, ACC)
    p = tl.full([LANES], 1, ACC)
    u = tl.full([LANES], 0, ACC)
    v = tl.full([LANES], 0, ACC)
    m = tl.full([LANES], 0, ACC)
    p_n = tl.full([LANES], 1, ACC)
    v_n = tl.full([LANES], 0, ACC)
    m_n = tl.full([LANES], 0, ACC)
    stop = tl.minimum(chunk * length + length, T)
    for s in tl.range(chunk * length, stop, num_stages=3):
        step = stop - 1 - (s - chunk * length)
        t = T - 1 - step if REVERSE else step
        row, in_bounds = row_at(t, b, B, offsets, mask)
        _, direct, through_h, jacobian = FACTORS(
            gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, in_bounds, ACC
        )
        D_h, D_c, D_n = diagonals(
            direct, jacobian, fixed, diagonal, row, unit, H, in_bounds, STATES, PROJECTED, RULE, ACC
        )
        delta = u
        if e is not None:
            delta += tl.load(e + row * e_stride + unit, in_bounds, 0).to(ACC)
        if STATES > 1:
            c_at = row * H + unit if PROJECTED else row * (STATES * H) + H + unit
            m, p, v = _add_step(m, p, v, D_c, through_h[0], delta, a, residual, c_at, in_bounds)
        if STATES > 2:
            n_at = row * (STATES * H) + 2 * H + unit
            m_n, p_n, v_n = _add_step(m_n, p_n, v_n, D_n, through_h[1], delta, a, residual, n_at, in_bounds)
        carry = D_h * delta
        if residual is not None and not PROJECTED:
            carry += tl.load(residual + row * (STATES * H) + unit, in_bounds, 0)
        u = tl.where(in_bounds, carry, u)
        a = tl.where(in_bounds, scaled(D_h, a), a)
    lanes = tl.cast(B, tl.int64) * H
    at = summary + chunk * lanes * (3 * STATES - 1) + lane
    tl.store(at, a, mask)
    tl.store(at + lanes, u, mask)
    if STATES > 1:
        tl.store(at + 2 * lanes, m, mask)
        tl.store(at + 3 * lanes, p, mask)
        tl.store(at + 4 * lanes, v, mask)
    if STATES > 2:
        tl.store(at + 5 * lanes, m_n, mask)
        tl.store(at + 6 * lanes, p_n, mask)
        tl.store(at + 7 * lanes, v_n, mask)


@triton.jit
def _add_step(m, p, v, D, through_h, delta, a, residual, at, in_bounds):
    """The summary of c or of n with one step more."""
    carry = D * (through_h * delta + v)
    if residual is not None:
        carry += tl.load(residual + at, in_bounds, 0)
    v = tl.where(in_bounds, carry, v)
    # An overflowed product that meets a zero factor is zero again, as the carry is.
    m = tl.where(in_bounds, scaled(D, scaled(through_h, a) + m), m)
    p = tl.where(in_bounds, scaled(D, p), p)
    return m, p, v


@triton.jit
def _add_chunk(carry_h, carry, summary, lanes, mask):
    """The carry of c or of n through one chunk; ``summary`` has the m, p and v of its lanes."""
    return (
        scaled(carry_h, tl.load(summary, mask, 0))
        + scaled(carry, tl.load(summary + lanes, mask, 0))
        + tl.load(summary + 2 * lanes, mask, 0)
    )


@triton.jit(do_not_specialize=["T", "B", "length"])
def run(
    gates, saved, state, state_stride, w_hh, diagonal, offsets, e, e_stride, final_h, final_c, final_n, residual,
    summary, next_residual, d, d_candidate, sums, initial_h, initial_c, initial_n, T, B, H, length,
    FACTORS: tl.constexpr, LOCAL: tl.constexpr, STATES: tl.constexpr, PROJECTED: tl.constexpr, GATES: tl.constexpr,
    HEAD: tl.constexpr, RULE: tl.constexpr, REVERSE: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A chunk from what reaches its last step: gradients at its gates, their sums, what leaves its first step."""
    H = even(H, PAIRS)
    state_stride = even(state_stride, PAIRS)
    e_stride = even(e_stride, PAIRS)
    lane, b, unit, mask = lanes_of(B, H, LANES)
    chunk = tl.program_id(1)
    lanes = tl.cast(B, tl.int64) * H
    w0, w1, w2, w3 = w_hh_diagonal(w_hh, unit, H, GATES, HEAD, RULE, ACC)
    fixed = stationary_diagonal(diagonal, unit, H, STATES, PROJECTED, RULE, ACC)
    carry = tl.full([LANES], 0, ACC)
    carry_c = tl.full([LANES], 0, ACC)
    carry_n = tl.full([LANES], 0, ACC)
    if final_h is not None:
        carry = tl.load(final_h + lane, mask, 0).to(ACC)
    if final_c is not None:
        carry_c = tl.load(final_c + lane, mask, 0).to(ACC)
    if final_n is not None:
        carry_n = tl.load(final_n + lane, mask, 0).to(ACC)
    if summary is not None:
        for s in tl.range(0, tl.num_programs(1) - 1 - chunk):
            at = summary + (tl.num_programs(1) - 1 - s) * lanes * (3 * STATES - 1) + lane
            if STATES > 1:
                carry_c = _add_chunk(carry, carry_c, at + 2 * lanes, lanes, mask)
            if STATES > 2:
                carry_n = _add_chunk(carry, carry_n, at + 5 * lanes, lanes, mask)
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
        k, direct, through_h, jacobian = FACTORS(
            gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, in_bounds, ACC
        )
        D_h, D_c, D_n = diagonals(
            direct, jacobian, fixed, diagonal, row, unit, H, in_bounds, STATES, PROJECTED, RULE, ACC
        )
        delta = carry
        if e is not None:
            delta += tl.load(e + row * e_stride + unit, in_bounds, 0).to(ACC)
        gamma_c = carry_c
        gamma_n = carry_n
        if STATES > 1:
            gamma_c = through_h[0] * delta + carry_c
        if STATES > 2:
            gamma_n = through_h[1] * delta + carry_n
        state_at = row * (STATES * H) + unit
        next_carry = D_h * delta
        if residual is not None and not PROJECTED:
            next_carry += tl.load(residual + state_at, in_bounds, 0)
        if next_residual is not None and not PROJECTED:
            tl.store(next_residual + state_at, (direct[0] - D_h) * delta, in_bounds)
        carry = tl.where(in_bounds, next_carry, carry)
        if STATES > 1:
            c_at = row * H + unit if PROJECTED else state_at + H
            carry_c = _before_step(carry_c, gamma_c, D_c, direct[1], residual, next_residual, c_at, in_bounds)
        if STATES > 2:
            n_at = state_at + 2 * H
            carry_n = _before_step(carry_n, gamma_n, D_n, direct[2], residual, next_residual, n_at, in_bounds)
        d0, d1, d2, d3 = LOCAL(k, delta, gamma_c, gamma_n)
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
        if STATES > 1:
            tl.store(initial_c + lane, carry_c, mask)
        if STATES > 2:
            tl.store(initial_n + lane, carry_n, mask)
    if sums is not None:
        at = sums + ((tl.cast(chunk, tl.int64) * B + b) * (4 * H if GATES > 1 else H)) + unit
        tl.store(at, sum0, mask)
        if GATES > 1:
            tl.store(at + H, sum1, mask)
            tl.store(at + 2 * H, sum2, mask)
            tl.store(at + 3 * H, sum3, mask)


@triton.jit
def _before_step(carry, gamma, D, direct, residual, next_residual, at, in_bounds):
    """The carry of c or of n before the step, from its gradient after it."""
    next_carry = D * gamma
    if residual is not None:
        next_carry += tl.load(residual + at, in_bounds, 0)
    if next_residual is not None:
        tl.store(next_residual + at, (direct - D) * gamma, in_bounds)
    return tl.where(in_bounds, next_carry, carry)


@triton.jit(do_not_specialize=["T", "B", "length"])
def add_jacobians(
    gates, saved, state, state_stride, w_hh, offsets, sums, T, B, H, length,
    FACTORS: tl.constexpr, LOCAL: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, HEAD: tl.constexpr,
    PAIRS: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The diagonal of the Jacobian, summed over a chunk."""
    H = even(H, PAIRS)
    state_stride = even(state_stride, PAIRS)
    _lane, b, unit, mask = lanes_of(B, H, LANES)
    chunk = tl.program_id(1)
    w0, w1, w2, w3 = w_hh_diagonal(w_hh, unit, H, GATES, HEAD, "jacobian", ACC)
    sum_h = tl.full([LANES], 0, ACC)
    sum_c = tl.full([LANES], 0, ACC)
    sum_n = tl.full([LANES], 0, ACC)
    for t in tl.range(chunk * length, tl.minimum(chunk * length + length, T), num_stages=3):
        row, in_bounds = row_at(t, b, B, offsets, mask)
        _, _, _, jacobian = FACTORS(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, in_bounds, ACC)
        sum_h += tl.where(in_bounds, jacobian[0], 0)
        if STATES > 1:
            sum_c += tl.where(in_bounds, jacobian[1], 0)
        if STATES > 2:
            sum_n += tl.where(in_bounds, jacobian[2], 0)
    at = sums + (tl.cast(chunk, tl.int64) * B + b) * (STATES * H) + unit
    tl.store(at, sum_h, mask)
    if STATES > 1:
        tl.store(at + H, sum_c, mask)
    if STATES > 2:
        tl.store(at + 2 * H, sum_n, mask)
