"""Registration of the Triton operators, opaque to torch.compile, with their fake implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statefeed.backends.protocol import Weights
from statefeed.backends.triton.backward import backward, mean_jacobian
from statefeed.backends.triton.cells import CELLS
from statefeed.backends.triton.gather import columns
from statefeed.backends.triton.recompute import recompute
from statefeed.native.flop_table import register

_LIBRARY = torch.library.Library("statefeed", "FRAGMENT")
_LIBRARY.define(
    "triton_recompute(str cell, Tensor x, Tensor y, Tensor[] state, Tensor[] weights, Tensor? offsets, bool reverse, "
    "str precision) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "triton_mean_jacobian(str cell, Tensor inputs, Tensor gates, Tensor saved, Tensor y, Tensor w_hh, SymInt B, "
    "Tensor? offsets) -> Tensor"
)
_LIBRARY.define(
    "triton_backward(str cell, str rule, Tensor inputs, Tensor(a!) gates, Tensor(b!) saved, Tensor x, Tensor y, "
    "Tensor[] state, Tensor[] weights, Tensor?[] grads, Tensor? diagonal, Tensor? offsets, int corrections, "
    "bool reverse, bool needs_x, str precision) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _name, _implementation in (
    ("triton_recompute", recompute),
    ("triton_mean_jacobian", mean_jacobian),
    ("triton_backward", backward),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("statefeed::triton_recompute", lib=_LIBRARY)
def _recompute_fake(
    cell: str,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    offsets: Tensor | None,
    reverse: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    this, (N, O), H = CELLS[cell], y.shape, state[-1].shape[1]
    inputs = y.new_empty((N, columns(x.shape[-1] if this.gates > 1 else 0, O, y.dtype).width))
    if this.gates == 1:
        return inputs, y.new_empty(0), y.new_empty(0)
    dtype = torch.promote_types(y.dtype, torch.float32) if this.saved == "cell_state" else y.dtype
    return inputs, y.new_empty((N, this.gates * H)), y.new_empty((N, H), dtype=dtype)


@torch.library.register_fake("statefeed::triton_mean_jacobian", lib=_LIBRARY)
def _mean_jacobian_fake(
    cell: str, inputs: Tensor, gates: Tensor, saved: Tensor, y: Tensor, w_hh: Tensor, B: int, offsets: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(y.dtype, torch.float32)
    this, O = CELLS[cell], y.shape[-1]
    H = gates.shape[-1] // this.gates if this.gates > 1 else O
    return y.new_empty(O + (this.states - 1) * H, dtype=dtype)


@torch.library.register_fake("statefeed::triton_backward", lib=_LIBRARY)
def _backward_fake(
    cell: str,
    rule: str,
    inputs: Tensor,
    gates: Tensor,
    saved: Tensor,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    diagonal: Tensor | None,
    offsets: Tensor | None,
    corrections: int,
    reverse: bool,
    needs_x: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    parts = (*state, None, None)[:3]
    return like(x if needs_x else None), *(like(s) for s in parts), *(like(w) for w in Weights.of(weights))


def _recompute_flops(cell: str, x: Any, y: Any, state: Any, weights: Any, *others: Any, **_: Any) -> int:
    """The products of both sides of every gate, where a cell's gates are not functions of its output."""
    (gates, inputs), (__, hidden) = weights[:2]
    return 2 * int(x[0] * gates * (inputs + hidden)) if CELLS[cell].gates > 1 else 0


def _backward_flops(cell: str, rule: str, *others: Any, **_: Any) -> int:
    """The gradients of both weights and of x, and one product more per correction."""
    x, weights, corrections, needs_x = others[3], others[6], others[10], others[12]
    (gates, inputs), (__, hidden) = weights[:2]
    projection = weights[-1][0] * weights[-1][1] * (2 + corrections) if CELLS[cell].projects else 0
    of_diagonal = hidden if CELLS[cell].projects and rule == "jacobian" else 0
    of_hidden = hidden * (1 + corrections) + of_diagonal
    return 2 * int(x[0] * (gates * (inputs * (1 + needs_x) + of_hidden) + projection))


register(torch.ops.statefeed.triton_recompute, _recompute_flops)
register(torch.ops.statefeed.triton_backward, _backward_flops)
