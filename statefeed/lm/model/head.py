"""Cross-entropy of the head, computed in chunks of rows so that the logits are never in memory all at once.

torch's `linear_cross_entropy` needs torch 2.13, while this package supports 2.10. It also sums the loss in the dtype of
its products, and a sum in bfloat16 is too coarse for a learning curve.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from statefeed import native as kernels
from statefeed.native.head import losses, losses_and_gradients

# Logits of a chunk. On a CPU 16 MiB in float32: the allocator reuses such blocks, but maps and unmaps larger ones. On a
# GPU 256 MiB: every chunk costs the host about twenty launches, which smaller chunks take longer to queue than to run.
LOGITS = {"cpu": 1 << 22, "gpu": 1 << 26}


def cross_entropy_sum(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of targets under the logits x @ weight.T + bias, summed over rows.

    Products are in the dtype of autocast if it is enabled, losses and sums in at least float32. In float32 and bfloat16
    on a CPU a fused kernel computes everything.

    Args:
        x: (N, H).
        weight: (V, H).
        bias: (V,).
        targets: ids, int64 (N,).

    Returns:
        The sum in nats, a scalar.

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
    """The loss alone, when autograd is disabled."""
    if fused:
        return losses(x.float(), weight, bias, targets, compute_dtype == torch.bfloat16).sum()
    rows = _rows(x, weight)
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    for start in range(0, len(x), rows):
        part, part_targets = x[start : start + rows], targets[start : start + rows]
        logits = F.linear(part.to(compute_dtype), weight.to(compute_dtype), bias.to(compute_dtype))
        total += F.cross_entropy(logits.to(total.dtype), part_targets, reduction="sum")
    return total


def _rows(x: Tensor, weight: Tensor) -> int:
    """Number of rows of a chunk."""
    return max(1, LOGITS["cpu" if x.is_cpu else "gpu"] // len(weight))


class _CrossEntropySum(torch.autograd.Function):
    """Computes gradients in the forward pass, while the logits of a chunk are in memory."""

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
    """The loss and its gradients, chunk by chunk, in torch operations.

    The gradient of the logits is softmax - one_hot(target), and the softmax is e / sum(e) with e = exp(logits -
    maximum). The products take e itself. The divisor and the one-hot target are applied to their smaller operands.
    """
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    w, b = weight.to(compute_dtype), bias.to(compute_dtype)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), weight.new_zeros(weight.T.shape), torch.zeros_like(bias)
    total = x.new_zeros((), dtype=sum_dtype)
    rows = _rows(x, weight)
    for start in range(0, len(x), rows):
        part, part_targets = x[start : start + rows].to(compute_dtype), targets[start : start + rows]
        logits = F.linear(part, w, b).to(sum_dtype)
        maximum, target_logits = logits.amax(1, keepdim=True), logits.gather(1, part_targets[:, None])
        e = logits.sub_(maximum).exp_()
        divisor = e.sum(1, keepdim=True)
        total += (maximum + divisor.log() - target_logits).sum()
        scale = divisor.reciprocal()
        grad_bias += (scale.T @ e)[0]
        e = e.to(compute_dtype)
        grad_x[start : start + rows] = F.linear(e, w.T) * scale - w[part_targets]
        grad_weight += F.linear((part * scale).to(compute_dtype).T, e.T)
    grad_weight = grad_weight.T.index_add(0, targets, x.to(weight.dtype), alpha=-1)
    grad_bias.index_add_(0, targets, torch.ones_like(targets, dtype=bias.dtype), alpha=-1)
    return total, (grad_x, grad_weight, grad_bias)
