"""Owns the loss of the head: logits are made a few rows at a time and never exist all at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 1 << 22  # at once: 16 MiB in float32, which the allocator keeps, where it maps and unmaps much larger ones


def nats(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of targets under the logits x @ weight.T + bias, summed.

    Products are in the dtype of autocast where that is on, losses and sums in float32 at least.

    Args:
        x: (N, H).
        weight: (V, H).
        bias: (V,).
        targets: ids, int64 (N,).

    Returns:
        A number in nats, not divided by N.

    >>> x, weight, bias, targets = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7), torch.arange(5)
    >>> whole = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")
    >>> torch.allclose(nats(x, weight, bias, targets), whole)
    True
    """
    kind = x.device.type
    narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    rows = max(1, LOGITS // len(weight))
    if not torch.is_grad_enabled():
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for start in range(0, len(x), rows):
            part, wanted = x[start : start + rows], targets[start : start + rows]
            logits = _product(part.to(narrow), weight.to(narrow), bias.to(narrow))
            total += F.cross_entropy(logits.to(total.dtype), wanted, reduction="sum")
        return total
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _Nats.apply(x, weight, bias, targets, narrow, rows)  # type: ignore[no-untyped-call]
    return loss


class _Nats(torch.autograd.Function):
    """Gradients are made with the loss, while the logits of a chunk are there.

    The error is the softmax less the target, and the softmax is e / sum(e) with e = exp(logits - maximum): e enters the
    products as it is, while its divisor and the target are applied to the smaller sides of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, narrow: torch.dtype, rows: int
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        w, b = weight.to(narrow), bias.to(narrow)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), weight.new_zeros(weight.T.shape), torch.zeros_like(bias)
        total = x.new_zeros((), dtype=wide)
        for start in range(0, len(x), rows):
            part, wanted = x[start : start + rows].to(narrow), targets[start : start + rows]
            logits = _product(part, w, b).to(wide)
            maximum, right = logits.amax(1, keepdim=True), logits.gather(1, wanted[:, None])
            e = logits.sub_(maximum).exp_()
            divisor = e.sum(1, keepdim=True)
            total += (maximum + divisor.log() - right).sum()
            share = divisor.reciprocal()
            grad_bias += (share.T @ e)[0]
            e = e.to(narrow)
            grad_x[start : start + rows] = _product(e, w.T) * share - w[wanted]
            grad_weight += _product((part * share).to(narrow).T, e.T)
        grad_weight = grad_weight.T.index_add(0, targets, x.to(weight.dtype), alpha=-1)
        grad_bias.index_add_(0, targets, torch.ones_like(targets, dtype=bias.dtype), alpha=-1)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, grad_bias * grad, None, None, None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias; in float32 on a CPU through oneDNN, to which torch would prefer a slower library on an AMD."""
    onednn = a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not onednn:
        return F.linear(a, b, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product
