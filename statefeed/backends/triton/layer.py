"""One layer in one direction under the signatures that ``statefeed.recurrence`` calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed.backends.cpu.layer import Gradients
from statefeed.backends.triton import operators  # noqa: F401
from statefeed.backends.triton.precision import forward_precision

_RULES = {"gate": "direct", "jacobian": "jacobian"}


class Tape(NamedTuple):
    """Gathered inputs, gates and what else a cell needs; offsets of packed rows; the precision of the products."""

    inputs: Tensor
    gates: Tensor
    saved: Tensor
    offsets: Tensor | None
    B: int
    precision: str


def tape(
    cell: str,
    x: Tensor,
    y: Tensor,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
) -> Tape:
    """What the forward pass did not store, recomputed in the dtype of y."""
    offsets = None if batch_sizes is None else F.pad(batch_sizes.cumsum(0), (1, 0)).to(y.device)
    precision = forward_precision()
    inputs, gates, saved = torch.ops.statefeed.triton_recompute(cell, x, y, state, weights, offsets, False, precision)
    return Tape(inputs, gates, saved, offsets, len(state[0]), precision)


def backward(
    cell: str,
    tape: Tape,
    x: Tensor,
    y: Tensor,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    grads: tuple[Tensor, ...],
    diagonal: Tensor | str,
    corrections: int = 0,
    needs_x: bool = True,
) -> Gradients:
    """Gradients of one layer in one direction under a feedback rule; uses up the tape."""
    rule, D = (_RULES[diagonal], None) if isinstance(diagonal, str) else ("stationary", diagonal)
    if D is not None and D.dim() > 1:
        rule = "per_row"
    d_x, *rest = torch.ops.statefeed.triton_backward(
        cell, rule, *tape[:3], x, y, state, weights, grads, D, tape.offsets, corrections, False, needs_x, tape.precision
    )
    return Gradients(d_x if needs_x else None, tuple(rest[: len(state)]), list(rest[2 : 2 + len(weights)]))


def mean_jacobian(cell: str, tape: Tape, y: Tensor, w_hh: Tensor) -> Tensor:
    """The mean of diag(J[t]) over all rows, (S,) in float32 or float64."""
    found: Tensor = torch.ops.statefeed.triton_mean_jacobian(cell, *tape[:3], y, w_hh, tape.B, tape.offsets)
    return found
