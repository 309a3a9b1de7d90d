"""Table of the backends, which run one layer forward and backward under a feedback rule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from statefeed.backends import cpu, reference
from statefeed.backends.protocol import Backend, Forward, Gradients, Problem, Upstream
from statefeed.backends.triton import backend as triton
from statefeed.cells.protocol import Cell

# The first backend that supports a layer runs it; the reference supports every layer.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (cpu.BACKEND, triton.BACKEND, reference.BACKEND)}


def choose(cell: Cell, tensors: Sequence[Tensor], exact: bool, from_states: bool = False) -> Backend:
    """Select the backend that runs a layer.

    Args:
        cell: cell of the layer.
        tensors: x, initial states and weights.
        exact: whether the rule is exact.
        from_states: whether the backward pass must start from the states alone, because another forward pass ran.

    Returns:
        The first backend in the table that supports the layer.
    """
    able = (b for b in BACKENDS.values() if not (from_states and b.saves))
    return next(b for b in able if b.unsupported_reason(cell, tensors, exact) is None)


def flatten_weights(cell: Cell, weights: Sequence[Tensor], directions: int) -> None:
    """Move the weights of one layer into the memory layout of their device's forward pass, without changing values.

    Args:
        cell: cell of the layer.
        weights: in the order of ``Problem.weights``, of the first direction, then of the second.
        directions: 1 or 2.
    """
    if weights[0].is_cuda:
        from statefeed.backends.triton import cudnn

        cudnn.flatten(cell.torch_forward or cell.name, weights, directions)


def unsupported_reasons(cell: Cell, tensors: Sequence[Tensor], exact: bool) -> dict[str, str]:
    """Why the backends listed before the selected one do not support a layer, by name."""
    reasons = {}
    for backend in BACKENDS.values():
        reason = backend.unsupported_reason(cell, tensors, exact)
        if reason is None:
            break
        reasons[backend.name] = reason
    return reasons


__all__ = [
    "BACKENDS",
    "Backend",
    "Forward",
    "Gradients",
    "Problem",
    "Upstream",
    "choose",
    "flatten_weights",
    "unsupported_reasons",
]
