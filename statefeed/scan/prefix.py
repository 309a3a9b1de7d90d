"""y[t] = a[t] y[t-1] + x[t] as a prefix sum over pairs (a, x): O(T) work, 2 log2(T) dependent steps.

Two neighbours compose to one step, (a, x) then (a', x') = (a' a, a' x + x'). Odd positions obey the composed recurrence
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
    first = x[:1]
    if initial is not None and len(x):
        first = torch.addcmul(first, a if a.dim() == 1 else a[:1], initial)
    if len(x) <= 1:
        return first.clone()

    stationary = a.dim() == 1
    even, odd = x[0::2], x[1::2]
    a_even, a_odd = (a, a) if stationary else (a[0::2], a[1::2])
    pairs = len(odd)

    composed = torch.empty_like(odd)
    torch.addcmul(odd[:1], a_odd if stationary else a_odd[:1], first, out=composed[:1])
    torch.addcmul(odd[1:], a_odd if stationary else a_odd[1:], even[1:pairs], out=composed[1:])
    a_composed = a * a if stationary else a_odd * a_even[:pairs]

    y = torch.empty_like(x)
    y[1::2] = scan(composed, a_composed, None)
    y[:1] = first
    torch.addcmul(even[1:], a_even if stationary else a_even[1:], y[1:-1:2], out=y[2::2])
    return y
