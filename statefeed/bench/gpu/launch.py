"""A Triton kernel that adds one, to check compilation, launch and reading back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 16


@triton.jit
def _add_one(x, y, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = place < n
    tl.store(y + place, tl.load(x + place, mask=in_bounds) + 1, mask=in_bounds)


def add_one(x: Tensor) -> Tensor:
    """x + 1 for a contiguous x."""
    y = torch.empty_like(x)
    _add_one[(triton.cdiv(x.numel(), _BLOCK),)](x, y, x.numel(), BLOCK=_BLOCK)
    return y
