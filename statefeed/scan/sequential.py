"""Sequential method: y[t] = a[t] y[t-1] + x[t] as a loop of T dependent steps; the reference for the other methods."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(x: Tensor, a: Tensor, initial: Tensor | None) -> Tensor:
    """Run the recurrence one step at a time.

    Args:
        x: (T, ..., S).
        a: (S,) or the shape of x.
        initial: y[-1], the shape of x[0], or None for zero.

    Returns:
        y, the shape of x.
    """
    y = torch.empty_like(x)
    steps = [a] * len(x) if a.dim() == 1 else list(a)
    state = initial
    for t in range(len(x)):
        if state is None:
            y[t] = x[t]
        else:
            torch.addcmul(x[t], steps[t], state, out=y[t])
        state = y[t]
    return y
