"""The loss of a softmax head through the fused kernel, with its gradients.

    p = softmax(x W^T + b),   loss = -log p[target],   e = p - onehot(target),   dx = e W,   dW = e^T x,   db = sum e

Logits are made for some two hundred rows and a strip of classes at a time, and become exponentials while they are in
cache.
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


def losses(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rounded: bool = False) -> Tensor:
    """The cross-entropy of every row.

    Args:
        x: (N, H), float32 like everything but the targets.
        weight: (V, H).
        bias: (V,).
        targets: ids, int64 (N,).
        rounded: round what enters a product to bfloat16, as autocast does, where the CPU gains by it; sums and
            exponentials stay float32.

    Returns:
        Losses in nats (N,).

    Raises:
        IndexError: a target is not among the V classes.

    Gradient: none; ``losses_and_gradients`` makes it.

    Cost: one product over all rows; some 100,000 numbers of scratch and the weights once more.
    """
    return _run(x, weight, bias, targets, rounded, None)


def losses_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rounded: bool = False
) -> tuple[Tensor, Gradients]:
    """The same with the gradients of the sum of all losses, which lie on memory that must not leave the package.

    Cost: three products over all rows; 384 V numbers of scratch, 192 V for each thread, and the weights three
    times more.
    """
    grads = Gradients(x.new_empty(x.shape), empty(len(weight), weight.shape[1], weight), bias.new_empty(bias.shape))
    return _run(x, weight, bias, targets, rounded, grads), grads


def _run(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rounded: bool, grads: Gradients | None) -> Tensor:
    if len(targets):
        least, most = (int(t) for t in torch.aminmax(targets))
        if least < 0 or most >= len(weight):
            raise IndexError(f"targets must be ids of the head's {len(weight)} classes, got {least} to {most}")
    result = x.new_empty(len(x))
    arguments = (t.contiguous() for t in (x, weight, bias, targets))
    torch.ops.statefeed.head_loss(rounded, *arguments, result, *(grads or (None, None, None)))
    return result
