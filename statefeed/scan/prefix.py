"""Prefix method: y[t] = a[t] y[t-1] + x[t] as a prefix sum over pairs (a, x); O(T) work, 2 log2(T) dependent steps.

Two neighbors compose to one step: (a, x) then (a', x') is (a' a, a' x + x'). Odd positions obey the composed recurrence
of half the length; even positions follow from the odd ones before them (Blelloch, 1990, odd-even reduction).
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan(x: Tensor, a: Tensor, initial: Tensor | None) -> Tensor:
    """Run the recurrence by recursive halving.

    Args:
        x: (T, ..., S).
        a: (S,) or the shape of x.
        initial: y[-1], the shape of x[0], or None for zero.

    Returns:
        y, the shape of x.
    """
    stationary = a.dim() == 1
    if stationary:
        # Squaring doubles the relative error, so powers of a stationary diagonal are computed in double precision.
        a = a.to(torch.complex128 if a.is_complex() else torch.float64)

    def factor(start: int, stop: int | None = None) -> Tensor:
        return a.to(x.dtype) if stationary else a[start:stop:2]

    first = x[:1]
    if initial is not None and len(x):
        first = torch.addcmul(first, factor(0, 1), initial)
    if len(x) <= 1:
        return first.clone()

    paired = len(x) // 2 * 2
    composed = x[1::2].clone()
    composed[:1].addcmul_(factor(1, 2), first)
    composed[1:].addcmul_(factor(3), x[2:paired:2])
    a_composed = a * a if stationary else a[1::2] * a[0:paired:2]

    y = x.clone()
    y[:1] = first
    y[1::2] = scan(composed, a_composed, None)
    y[2::2].addcmul_(factor(2), y[1:-1:2])
    return y
