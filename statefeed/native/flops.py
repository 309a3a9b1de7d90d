"""Matrix products of the operators, as torch.utils.flop_counter.FlopCounterMode counts them."""

from __future__ import annotations

from typing import Any

import torch

from statefeed.native.flop_table import register


def _layer_forward(cell: str, bf16: bool, x: Any, w_ih: Any, w_hh: Any, *others: Any, **_: Any) -> int:
    return 2 * int(x[0] * (w_hh[0] * (_columns(w_ih) + w_hh[1]) + _projection(others[9:])))


def _layer_backward(
    cell: str, rule: str, corrections: int, bf16: bool, x: Any, w_ih: Any, w_hh: Any, *others: Any, **_: Any
) -> int:
    """The gradients of both weights and of x; one product more per correction, and for exact BPTT.

    With a projection, the gradients of its input and of its weight, and the product of the rule jacobian.
    """
    needs_x, projection = others[10] is not None, _projection(others[16:])
    passes = 1 + corrections
    hidden = passes + (rule == "exact") + (passes if projection and rule == "jacobian" else 0)
    inputs = _columns(w_ih) * (1 + needs_x)
    return 2 * int(x[0] * (w_hh[0] * (inputs + w_hh[1] * hidden) + projection * (1 + passes)))


def _columns(w_ih: Any) -> Any:
    """Columns of W_ih; zero if x are the preactivations."""
    return w_ih[1] if len(w_ih) > 1 else 0


def _projection(w_hr: Any) -> int:
    """Multiply-adds per row of the product with W_hr, the first of the remaining arguments if there is one."""
    return int(w_hr[0][0] * w_hr[0][1]) if w_hr and w_hr[0] is not None else 0


def _head_loss(bf16: bool, x: Any, w: Any, *others: Any, **_: Any) -> int:
    """The logits; with gradients two products more."""
    return 2 * int(x[0] * w[0] * w[1]) * (1 if others[-1] is None else 3)


register(torch.ops.statefeed.layer_forward, _layer_forward)
register(torch.ops.statefeed.layer_backward, _layer_backward)
register(torch.ops.statefeed.head_loss, _head_loss)
