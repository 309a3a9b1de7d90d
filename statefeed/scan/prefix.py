"""Prefix method: y[t] = a[t] y[t-1] + x[t] as a prefix sum over pairs (a, x); O(T) work, 2 log2(T) dependent steps.

Two neighbors compose to one step: (a, x) then (a', x') is (a' a, a' x + x'). Odd positions obey the composed recurrence
of half the length; even positions follow from the odd ones before them (Blelloch, 1990, odd-even reduction).

A product of factors above 1 may overflow although no state does: it leaves a state of zero at zero, as the recurrence
does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statefeed.native.memory import is_ordinary


def scan(x: Tensor, a: Tensor, initial: Tensor | None) -> Tensor:
    """Run the recurrence by recursive halving.

    Args:
        x: (T, ..., S).
        a: (S,) or the shape of x.
        initial: y[-1], the shape of x[0], or None for zero.

    Returns:
        y, the shape of x.
    """
    if a.dim() == 1:
        # Squaring doubles the relative error, so powers of a stationary diagonal are computed in double precision.
        a = a.to(torch.complex128 if a.is_complex() else torch.float64)
    return _scan(x, a, initial, _may_overflow(a))


def _scan(x: Tensor, a: Tensor, initial: Tensor | None, guarded: bool) -> Tensor:
    stationary = a.dim() == 1

    def add(total: Tensor, start: int, stop: int | None, state: Tensor) -> Tensor:
        """``total`` plus the factors of every second step from ``start`` times ``state``, in place."""
        factor = a.to(x.dtype) if stationary else a[start:stop:2]
        if guarded:
            factor = torch.where(_overflowed(factor) & (state == 0), 0, factor)
        return total.addcmul_(factor, state)

    first = x[:1].clone()
    if initial is not None and len(x):
        add(first, 0, 1, initial)
    if len(x) <= 1:
        return first

    paired = len(x) // 2 * 2
    composed = x[1::2].clone()
    add(composed[:1], 1, 2, first)
    add(composed[1:], 3, None, x[2:paired:2])
    a_composed = a * a if stationary else _product(a[1::2], a[0:paired:2], guarded)

    y = x.clone()
    y[:1] = first
    y[1::2] = _scan(composed, a_composed, None, guarded)
    add(y[2::2], 2, None, y[1:-1:2])
    return y


def _product(a: Tensor, b: Tensor, guarded: bool) -> Tensor:
    if not guarded:
        return a * b
    return torch.where(((a == 0) & _overflowed(b)) | (_overflowed(a) & (b == 0)), 0, a * b)


def _overflowed(a: Tensor) -> Tensor:
    return ~a.isfinite() if a.is_complex() else a.isinf()


def _may_overflow(a: Tensor) -> bool:
    """Whether a product of factors may overflow; true where reading ``a`` would synchronize or end a graph."""
    if not is_ordinary(a) or not a.is_cpu:
        return True
    if not a.numel():
        return False
    largest = a.abs().max() if a.is_complex() else torch.stack(torch.aminmax(a)).abs().max()
    return not bool(largest <= 1)
