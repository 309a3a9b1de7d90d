"""What a backend is to the rest of the package: five functions over one layer.

    unsupported_reason   asked of every backend in turn, once per call of a module
    forward              all directions of one layer; what the backward pass needs is returned as ``saved``
    recompute            what the backward pass needs and the forward pass did not save, for one direction
    mean_jacobian        one direction; what learned rules observe
    backward             one direction under one rule

Rows are laid out as ``layout`` says, in natural time order also for the reverse direction. A backend that works in the
order of processing uses ``in_order`` and its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell, State
from statefeed.feedback.protocol import KernelRule
from statefeed.layout import Layout


class Problem(NamedTuple):
    """One layer in one direction on one input.

    Attributes:
        cell: from the table of cells.
        x: input rows (N, I).
        state: initial state, (B, width) for every part.
        weights: w_ih (G*H, I), w_hh (G*H, H) and, if there are biases, b_ih and b_hh (G*H,).
        layout: how the rows lie in time.
        reverse: whether the direction runs from the last step to the first.
        compute_dtype: dtype of the products under autocast, None without.
    """

    cell: Cell
    x: Tensor
    state: State
    weights: tuple[Tensor, ...]
    layout: Layout
    reverse: bool = False
    compute_dtype: torch.dtype | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Width of every part of the state."""
        return tuple(s.shape[1] for s in self.state)


class Forward(NamedTuple):
    """What a forward pass returns.

    Attributes:
        y: h of every row, (N, H), in the dtype that the backend computed in.
        final: final state, (B, width) for every part.
        saved: what ``backward`` of the same backend needs besides y; empty unless it was asked to save. Tensors in
            a forward pass; ``recompute`` may add what else the backward pass reads.
    """

    y: Tensor
    final: State
    saved: tuple[Any, ...] = ()


class Upstream(NamedTuple):
    """Gradients of the outputs: of y (N, H) and of every part of the final state (B, width)."""

    y: Tensor
    final: State


class Gradients(NamedTuple):
    """Gradients of x (N, I) if it was wanted, of the initial state and of the weights, shaped like these."""

    x: Tensor | None
    state: State
    weights: tuple[Tensor, ...]


class Description(NamedTuple):
    """What a backend does, for ``explain``.

    Attributes:
        forward: what runs the forward pass.
        backward: what runs the backward pass.
        why: why it may.
        saves_gates: whether the gates are saved between the two, ``Cell.saved_values`` per row and unit.
        recomputes_gates: whether the backward pass computes them again, two products.
    """

    forward: str
    backward: str
    why: str
    saves_gates: bool = False
    recomputes_gates: bool = False


class Backend(NamedTuple):
    """One member of the table of backends.

    Attributes:
        name: matches the key of the table.
        unsupported_reason: (cell, tensors, exact) -> why it cannot run a layer, or None. ``tensors`` are x, the initial
            states and the weights; ``exact`` asks for the exact rule.
        forward: (problems, save) -> one ``Forward`` per direction; problems differ in weights, state and ``reverse``.
        recompute: (problem, forward) -> the same with ``saved`` complete.
        mean_jacobian: (problem, recomputed) -> the mean of diag(J[t]) over all rows, (S,).
        backward: (problem, recomputed, upstream, rule, needs_x) -> ``Gradients``; may overwrite what was recomputed.
        device: the type of device that it has kernels for, None if any.
        describe: (cell, x, exact) -> ``Description``.
        upcasts: whether y and the final states stay float32 under autocast.
        saves: whether the backward pass needs what the backend's own forward pass saved, and cannot start from y alone.
        fused_forward: whether its forward pass runs without autograd too; else torch's own layer does, where torch has
            the cell.
        fallback: whether torch's own layer, where torch has the cell, is the better choice under an exact rule.
    """

    name: str
    unsupported_reason: Callable[[Cell, Sequence[Tensor], bool], str | None]
    forward: Callable[[Sequence[Problem], bool], list[Forward]]
    recompute: Callable[[Problem, Forward], Forward]
    mean_jacobian: Callable[[Problem, Forward], Tensor]
    backward: Callable[[Problem, Forward, Upstream, KernelRule, bool], Gradients]
    device: str | None = None
    describe: Callable[[Cell, Tensor, bool], Description] | None = None
    upcasts: bool = False
    saves: bool = False
    fused_forward: bool = False
    fallback: bool = False


def forward_in_order(run: Callable[[Problem, bool], Forward], problems: Sequence[Problem], save: bool) -> list[Forward]:
    """Run every direction in the order of processing; y returns in natural order, ``saved`` stays as it is."""
    found = []
    for problem in problems:
        done = run(in_order(problem), save)
        found.append(done._replace(y=problem.layout.reverse(done.y)) if problem.reverse else done)
    return found


def in_order(problem: Problem) -> Problem:
    """The same problem with the rows in the order of processing."""
    return problem._replace(x=problem.layout.reverse(problem.x), reverse=False) if problem.reverse else problem


def backward_in_order(
    run: Callable[[Problem, Forward, Upstream, KernelRule, bool], Gradients],
    problem: Problem,
    done: Forward,
    upstream: Upstream,
    rule: KernelRule,
    needs_x: bool,
) -> Gradients:
    """Run the backward pass of a direction in the order of processing; ``saved`` is in that order already."""
    if not problem.reverse:
        return run(problem, done, upstream, rule, needs_x)
    reverse = problem.layout.reverse
    done, upstream = done._replace(y=reverse(done.y)), upstream._replace(y=reverse(upstream.y))
    if rule.name == "per_row" and rule.diagonal is not None:
        rule = rule._replace(diagonal=reverse(rule.diagonal))
    found = run(in_order(problem), done, upstream, rule, needs_x)
    return found if found.x is None else found._replace(x=reverse(found.x))
