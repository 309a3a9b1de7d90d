"""Check of what Recurrent assumes of a cell: independent rows, no random numbers, a correct split, a diagonal J."""

from __future__ import annotations

import torch
from torch import Tensor

from statefeed.custom.steps import Steps

_ROUNDINGS = 1e4  # allowed difference, in units of the dtype's eps times the largest value
_VECTORS = 4  # an off-diagonal entry escapes one random sign vector with probability 1/2


def check_cell(steps: Steps, x: Tensor, initial: tuple[Tensor, ...], diagonal_jacobian: bool) -> None:
    """Raise unless a cell is what ``Recurrent`` assumes, on the states of an example.

    Args:
        steps: the steps of the cell.
        x: (T, B, I)
        initial: the initial state.
        diagonal_jacobian: whether the Jacobian must be diagonal.

    Raises:
        ValueError: what the cell does, and by how much.
    """
    name = type(steps.cell).__name__
    with torch.no_grad():
        inputs = steps.inputs(x)
        states = steps.loop(inputs, initial)
        rows = inputs.flatten(0, 1)
        before = tuple(torch.cat([s0[None], s[:-1]]).flatten(0, 1) for s, s0 in zip(states, initial, strict=True))
        after = steps.step(rows, before)
        _require_equal(
            steps.step(rows, before),
            after,
            f"{name} must return the same state twice, as the backward pass calls it again",
        )
        half = slice(0, (len(rows) + 1) // 2)
        _require_equal(
            steps.step(rows[half], tuple(s[half] for s in before)),
            tuple(s[half] for s in after),
            f"rows of {name} must be independent, but other rows change them",
        )
        if steps.split is not None:
            whole = steps._replace(split=None).step(x.flatten(0, 1), before)
            _require_equal(after, whole, f"{name}: step(project_input(x), state) must equal forward(x, state)")
    if diagonal_jacobian:
        _check_diagonal(name, steps, rows, before)


def _check_diagonal(name: str, steps: Steps, rows: Tensor, before: tuple[Tensor, ...]) -> None:
    """Compare J^T v with v * (J^T 1) for random sign vectors v: both are v * diag(J) if J is diagonal."""
    leaves = [s.detach().requires_grad_() for s in before]
    with torch.enable_grad():
        after = torch.cat(steps.step(rows, tuple(leaves)), -1)

    def vjp(v: Tensor) -> Tensor:
        found = torch.autograd.grad(after, leaves, v, retain_graph=True, materialize_grads=True)
        return torch.cat(found, -1)

    diagonal = vjp(torch.ones_like(after))
    for _ in range(_VECTORS):
        signs = (torch.randint(0, 2, after.shape, device=after.device) * 2 - 1).to(after.dtype)
        _require_equal(
            (vjp(signs),),
            (signs * diagonal,),
            f"{name} has no diagonal Jacobian, as diagonal_jacobian promises: leave diagonal_jacobian out",
        )


def _require_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], message: str) -> None:
    for a, b in zip(found, expected, strict=True):
        if not a.numel():
            continue
        scale = max(float(b.abs().max()), 1.0)
        difference = float((a - b).abs().max())
        if not difference <= _ROUNDINGS * torch.finfo(b.dtype).eps * scale:
            raise ValueError(f"{message}: expected a difference of at most rounding, got {difference:.3g}")
