"""Sigmoid, its logarithm and tanh in the accumulation dtype; Triton's own functions support only float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + exp(-x))); the last term corrects the rounding of 1 + exp(-|x|)."""
    small = tl.exp(-tl.abs(x))
    total = 1 + small
    return tl.minimum(x, 0) - tl.log(total) - (small - (total - 1)) / total
