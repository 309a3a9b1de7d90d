"""The cell on the rows of consecutive steps at once, with the graph of its vector-Jacobian products (VJPs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.custom.steps import Steps

# Elements of the state in a block. On a CPU larger tensors leave the cache, and the allocator maps them again.
ELEMENTS = 2**20


class Saved(NamedTuple):
    """What the forward pass saved.

    Attributes:
        steps: the steps of the cell.
        inputs: (T, B, .)
        states: the tensors of all states, each (T, B, .).
        initial: the tensors of the initial state, each (B, .).
        parameters: the parameters of the cell, by name.
        autocast: as in the forward pass.
    """

    steps: Steps
    inputs: Tensor
    states: tuple[Tensor, ...]
    initial: tuple[Tensor, ...]
    parameters: dict[str, Tensor]
    autocast: torch.autocast

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, B and S, the width of all tensors of the state together."""
        T, B = self.inputs.shape[:2]
        return T, B, sum(s.shape[-1] for s in self.states)

    def before(self, start: int, stop: int) -> list[Tensor]:
        """The states before the steps of a range, each (steps, B, .)."""
        if start:
            return [s[start - 1 : stop - 1] for s in self.states]
        return [torch.cat([s0[None], s[: stop - 1]]) for s, s0 in zip(self.states, self.initial, strict=True)]


def ranges(saved: Saved, whole: bool) -> list[tuple[int, int]]:
    """The first and the last step of each block, the last block first; one block if ``whole``, and on a GPU."""
    T, B, S = saved.shape
    steps = T if whole or not saved.inputs.is_cpu else max(1, ELEMENTS // max(1, B * S))
    starts = range(0, T, steps)
    return [(start, min(start + steps, T)) for start in reversed(starts)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The tensors of a state next to each other, (..., S); no copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


class Block:
    """The cell on the rows of the steps from ``start`` to ``stop``.

    Args:
        saved: what the forward pass saved.
        start: the first step.
        stop: the step after the last.
        needs: whether the inputs and each parameter need a gradient.
    """

    def __init__(self, saved: Saved, start: int, stop: int, needs: list[bool]) -> None:
        self._shape = (stop - start, *saved.shape[1:])
        self._inputs = saved.inputs[start:stop]
        tensors = [self._inputs.flatten(0, 1), *saved.parameters.values()]
        self._leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        self._before = [s.flatten(0, 1).detach().requires_grad_() for s in saved.before(start, stop)]
        named = dict(zip(saved.parameters, self._leaves[1:], strict=True))
        with torch.enable_grad(), saved.autocast:
            self._after = joined(saved.steps.step(self._leaves[0], tuple(self._before), named))

    def state_gradient(self, delta: Tensor) -> Tensor:
        """J^T delta, (steps, B, S)."""
        found = self._vjp(delta, self._before, retain_graph=True)
        grads = [torch.zeros_like(s) if g is None else g for g, s in zip(found, self._before, strict=True)]
        return joined(grads).reshape(self._shape)

    def gradients(self, delta: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, (steps, B, .), and of the parameters; frees the graph.

        None for what needs no gradient, and for what the cell does not use.
        """
        needed = [leaf for leaf in self._leaves if leaf.requires_grad]
        found = iter(self._vjp(delta, needed, retain_graph=False) if needed else ())
        d_inputs, *d_parameters = [next(found) if leaf.requires_grad else None for leaf in self._leaves]
        return [None if d_inputs is None else d_inputs.reshape(self._inputs.shape), *d_parameters]

    def _vjp(self, delta: Tensor, leaves: list[Tensor], retain_graph: bool) -> tuple[Tensor | None, ...]:
        rows = delta.flatten(0, 1).to(self._after.dtype)
        return torch.autograd.grad(self._after, leaves, rows, retain_graph=retain_graph, allow_unused=True)
