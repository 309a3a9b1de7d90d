"""Diagonal D of a rule at one row: "stationary", "per_row", "direct" or "jacobian"."""

from __future__ import annotations

import triton
import triton.language as tl

RULES = ("stationary", "per_row", "direct", "jacobian")


@triton.jit
def w_hh_diagonal(w_hh, unit, H, GATES: tl.constexpr, HEAD: tl.constexpr, RULE: tl.constexpr, ACC: tl.constexpr):
    """The weight from every unit to itself for each gate: the diagonals of W_hh (G * H, H); zeros if D needs none.

    HEAD: number of units of a head and columns of a block-diagonal W_hh; 0 for a dense one.
    """
    w0 = tl.zeros_like(unit).to(ACC)
    w1 = w0
    w2 = w0
    w3 = w0
    if RULE == "jacobian":
        if HEAD:
            at = w_hh + unit.to(tl.int64) * HEAD + unit % HEAD
            gate = tl.cast(H, tl.int64) * HEAD
        else:
            at = w_hh + unit.to(tl.int64) * H + unit
            gate = tl.cast(H, tl.int64) * H
        w0 = tl.load(at).to(ACC)
        if GATES > 1:
            w1 = tl.load(at + gate).to(ACC)
            w2 = tl.load(at + 2 * gate).to(ACC)
        if GATES == 4:
            w3 = tl.load(at + 3 * gate).to(ACC)
    return w0, w1, w2, w3


@triton.jit
def stationary_diagonal(
    diagonal, unit, H, STATES: tl.constexpr, PROJECTED: tl.constexpr, RULE: tl.constexpr, ACC: tl.constexpr
):
    """D of h, c and n, (S,), the same at every step; zeros for other rules. PROJECTED: of c alone."""
    fixed_h = tl.zeros_like(unit).to(ACC)
    fixed_c = fixed_h
    fixed_n = fixed_h
    if RULE == "stationary":
        if PROJECTED:
            fixed_c = tl.load(diagonal + unit).to(ACC)
        else:
            fixed_h = tl.load(diagonal + unit).to(ACC)
            if STATES > 1:
                fixed_c = tl.load(diagonal + H + unit).to(ACC)
            if STATES > 2:
                fixed_n = tl.load(diagonal + 2 * H + unit).to(ACC)
    return fixed_h, fixed_c, fixed_n


@triton.jit
def diagonals(
    direct, jacobian, fixed, diagonal, row, unit, H, mask,
    STATES: tl.constexpr, PROJECTED: tl.constexpr, RULE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """D of h, c and n at one row; ``diagonal`` has rows (N, S) for "per_row". PROJECTED: of c alone."""
    D_h, D_c, D_n = fixed
    if RULE == "direct" or RULE == "jacobian":
        known = direct if RULE == "direct" else jacobian
        D_h = known[0]
        if STATES > 1:
            D_c = known[1]
        if STATES > 2:
            D_n = known[2]
    if RULE == "per_row":
        if PROJECTED:
            D_c = tl.load(diagonal + row * H + unit, mask, 0).to(ACC)
        else:
            at = diagonal + row * (STATES * H) + unit
            D_h = tl.load(at, mask, 0).to(ACC)
            if STATES > 1:
                D_c = tl.load(at + H, mask, 0).to(ACC)
            if STATES > 2:
                D_n = tl.load(at + 2 * H, mask, 0).to(ACC)
    return D_h, D_c, D_n
