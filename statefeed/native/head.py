"""Loss and gradients of a softmax head by the fused kernel.

    p = softmax(x W^T + b),   loss = -log p[target],   e = p - onehot(target),   dx = e W,   dW = e^T x,   db = sum e

Logits are computed for about two hundred rows and one strip of classes at a time and exponentiated while in cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.native.memory import empty


class Gradients(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor


def losses(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, bf16: bool = False) -> Tensor:
    """The cross-entropy of every row.

    Args:
        x: (N, H), float32, as all arguments except the targets.
        weight: (V, H).
        bias: (V,).
        targets: class ids, int64 (N,).
        bf16: convert the operands of products to bfloat16, as autocast does, if the CPU has instructions for it; sums
            and exponentials stay float32.

    Returns:
        Losses in nats (N,).

    Gradient: none; ``losses_and_gradients`` computes it.

    Raises:
        IndexError: a target is not an id of the V classes.

    Cost: one product over all rows; a workspace of about 100,000 values and a packed copy of the weights.
    """
    return _run(x, weight, bias, targets, bf16, None)


def losses_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, bf16: bool = False
) -> tuple[Tensor, Gradients]:
    """The cross-entropy of every row, and the gradients of the sum of all losses; arguments as for ``losses``.

    The gradient of the weight is in reused memory and must not leave the package.

    Cost: three products over all rows; a workspace of 384 V values, 192 V values per thread, and three packed copies of
        the weights.
    """
    grads = Gradients(x.new_empty(x.shape), empty(len(weight), weight.shape[1], weight), bias.new_empty(bias.shape))
    return _run(x, weight, bias, targets, bf16, grads), grads


def _run(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, bf16: bool, grads: Gradients | None) -> Tensor:
    result = x.new_empty(len(x))
    inputs = (t.contiguous() for t in (x, weight, bias, targets))
    torch.ops.statefeed.head_loss(bf16, *inputs, result, *(grads or (None, None, None)))
    return result
