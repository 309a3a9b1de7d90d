"""FFT method: y = x * (1, a, a^2, ...) as a convolution, for stationary a; O(T log T), no dependent steps."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(x: Tensor, a: Tensor, initial: Tensor | None) -> Tensor:
    """Run the recurrence as one causal convolution, in double precision.

    A float32 transform adds to every output an error near 1e-7 of the *largest* output, which exceeds the small outputs
    of fast-decaying units. In double precision only the rounding of the result remains.

    Args:
        x: (T, ..., S).
        a: (S,).
        initial: y[-1], the shape of x[0], or None for zero.

    Returns:
        y, the shape of x.

    Raises:
        ValueError: a depends on the step.
    """
    if a.dim() != 1:
        raise ValueError(
            f'method "fft" needs a stationary diagonal of shape ({x.shape[-1]},), got a of shape {tuple(a.shape)}; '
            'use "prefix"'
        )
    T = len(x)
    if not x.numel():
        return x.clone()
    compute_dtype = torch.complex128 if x.is_complex() else torch.float64
    powers = _powers(a.to(compute_dtype), T + 1).reshape(T + 1, *[1] * (x.dim() - 2), -1)
    n = 1 << max(2 * T - 1, 1).bit_length()
    if x.is_complex():
        spectrum = torch.fft.fft(x.to(compute_dtype), n, dim=0) * torch.fft.fft(powers[:T], n, dim=0)
        y = torch.fft.ifft(spectrum, dim=0)[:T]
    else:
        spectrum = torch.fft.rfft(x.to(compute_dtype), n, dim=0) * torch.fft.rfft(powers[:T], n, dim=0)
        y = torch.fft.irfft(spectrum, n, dim=0)[:T]
    if initial is not None:
        y = y + powers[1:] * initial
    result: Tensor = y.to(x.dtype)
    return result


def _powers(a: Tensor, count: int) -> Tensor:
    """1, a, a^2, ..., (count, S), by doubling, without a logarithm, so that zero and negative values are allowed."""
    powers = torch.ones_like(a)[None]
    while len(powers) < count:
        powers, a = torch.cat([powers, powers * a]), a * a
    return powers[:count]
