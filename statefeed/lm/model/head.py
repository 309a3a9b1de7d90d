"""The loss of the head: logits are computed a few rows at a time and never exist all at once.

torch's `linear_cross_entropy` came with torch 2.13, while this package supports 2.10, and it sums the loss in the dtype
of its products: in bfloat16, which is too coarse for a curve.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from statefeed import native as kernels
from statefeed.native.head import losses, losses_and_gradients

LOGITS = 1 << 22  # at once: 16 MiB in float32, which the allocator reuses, while it maps and unmaps much larger blocks


def cross_entropy_sum(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of targets under the logits x @ weight.T + bias, summed.

    Products are in the dtype of autocast where that is on, losses and sums in float32 at least. In float32 and bfloat16
    on a CPU a fused kernel does it all.

    Args:
        x: (N, H).
        weight: (V, H).
        bias: (V,).
        targets: ids, int64 (N,).

    Returns:
        A number in nats, not divided by N.

    >>> x, weight, bias, targets = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7), torch.arange(5)
    >>> whole = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")
    >>> torch.allclose(cross_entropy_sum(x, weight, bias, targets), whole)
    True
    """
    kind = x.device.type
    compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    fused = kind == "cpu" and weight.dtype == torch.float32 and compute_dtype in _FUSED and kernels.available()
    if not torch.is_grad_enabled():
        return _without_gradients(x, weight, bias, targets, compute_dtype, fused)
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _CrossEntropySum.apply(x, weight, bias, targets, compute_dtype, fused)  # type: ignore[no-untyped-call]
    return loss


_FUSED = (torch.float32, torch.bfloat16)


def _without_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, compute_dtype: torch.dtype, fused: bool
) -> Tensor:
    """Without gradients."""
    if fused:
        return losses(x.float(), weight, bias, targets, compute_dtype == torch.bfloat16).sum()
    rows = max(1, LOGITS // len(weight))
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    for start in range(0, len(x), rows):
        part, wanted = x[start : start + rows], targets[start : start + rows]
        logits = F.linear(part.to(compute_dtype), weight.to(compute_dtype), bias.to(compute_dtype))
        total += F.cross_entropy(logits.to(total.dtype), wanted, reduction="sum")
    return total


class _CrossEntropySum(torch.autograd.Function):
    """Gradients are made with the loss, while the logits of a chunk are there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, compute_dtype: torch.dtype, fused: bool
    ) -> Tensor:
        ctx.dtype = x.dtype
        if not fused:
            total, grads = _chunks(x, weight, bias, targets, compute_dtype)
            ctx.save_for_backward(*grads)
            return total
        found, fused_grads = losses_and_gradients(x.float(), weight, bias, targets, compute_dtype == torch.bfloat16)
        ctx.save_for_backward(*fused_grads)
        return found.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        return (grad_x * grad).to(ctx.dtype), grad_weight * grad, grad_bias * grad, None, None, None


def _chunks(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, compute_dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss and its gradients through torch.

    The error is the softmax less the target, and the softmax is e / sum(e) with e = exp(logits - maximum): e enters the
    products as it is, while its divisor and the target are applied to the smaller sides of them.
    """
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    w, b = weight.to(compute_dtype), bias.to(compute_dtype)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), weight.new_zeros(weight.T.shape), torch.zeros_like(bias)
    total = x.new_zeros((), dtype=sum_dtype)
    rows = max(1, LOGITS // len(weight))
    for start in range(0, len(x), rows):
        part, wanted = x[start : start + rows].to(compute_dtype), targets[start : start + rows]
        logits = F.linear(part, w, b).to(sum_dtype)
        maximum, right = logits.amax(1, keepdim=True), logits.gather(1, wanted[:, None])
        e = logits.sub_(maximum).exp_()
        divisor = e.sum(1, keepdim=True)
        total += (maximum + divisor.log() - right).sum()
        share = divisor.reciprocal()
        grad_bias += (share.T @ e)[0]
        e = e.to(compute_dtype)
        grad_x[start : start + rows] = F.linear(e, w.T) * share - w[wanted]
        grad_weight += F.linear((part * share).to(compute_dtype).T, e.T)
    grad_weight = grad_weight.T.index_add(0, targets, x.to(weight.dtype), alpha=-1)
    grad_bias.index_add_(0, targets, torch.ones_like(targets, dtype=bias.dtype), alpha=-1)
    return total, (grad_x, grad_weight, grad_bias)
