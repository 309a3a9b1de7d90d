"""Interface of backends: five functions over one layer.

    unsupported_reason   called for the backends in order, once per call of a module
    forward              all directions of one layer; returns the tensors for the backward pass as ``saved``
    recompute            one direction; tensors for the backward pass that the forward pass did not save
    mean_jacobian        one direction; the input of learned rules
    backward             one direction under one rule

Rows are in natural time order, also for the reverse direction; ``layout`` has their positions. A backend that works in
the order of processing uses ``forward_in_order`` and ``backward_in_order``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell, State
from statefeed.feedback.protocol import KernelRule
from statefeed.layout import Layout


class Weights(NamedTuple):
    """The weights of one layer and direction by name; None where the layer has none."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Weights:
        """Weights in torch's order: w_ih, w_hh, then the biases if there are any, then w_hr if there is one."""
        w_ih, w_hh, *rest = weights
        b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
        return cls(w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None)


class Problem(NamedTuple):
    """One layer in one direction on one input.

    Attributes:
        cell: the cell.
        x: input rows (N, I); without W_ih the preactivations (N, G*H), to which only the biases are added.
        state: initial state, (B, width) for every part.
        weights: w_ih (G*H, I), w_hh (G*H, P), if there are biases b_ih and b_hh (G*H,), and if the cell projects h
            w_hr (P, H); otherwise P = H. w_ih is an empty vector (0,) if the cell has no W_ih.
        layout: positions of the rows in time.
        reverse: whether the direction runs from the last step to the first.
        compute_dtype: dtype of the products under autocast; None without autocast.
    """

    cell: Cell
    x: Tensor
    state: State
    weights: tuple[Tensor, ...]
    layout: Layout
    reverse: bool = False
    compute_dtype: torch.dtype | None = None

    @property
    def named_weights(self) -> Weights:
        """The weights by name."""
        return Weights.of(self.weights)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Width of every part of the state with a gradient; S is their sum."""
        return tuple(s.shape[1] for s in self.state[: self.cell.gradient_parts])


def lacks_w_ih(tensors: Sequence[Tensor]) -> bool:
    """Whether x, the initial states and the weights of a layer are those of a cell without W_ih."""
    return any(t.dim() == 1 and not t.numel() for t in tensors)


class Forward(NamedTuple):
    """Result of a forward pass in one direction.

    Attributes:
        y: h of every row, (N, P), in the dtype that the backend computed in.
        final: final state, (B, width) for every part.
        saved: tensors that ``backward`` of the same backend needs besides y; empty without ``save``. ``recompute`` may
            add other values.
    """

    y: Tensor
    final: State
    saved: tuple[Any, ...] = ()


class Upstream(NamedTuple):
    """Incoming gradients: of y (N, P) and of every part of the final state with a gradient (B, width)."""

    y: Tensor
    final: State


class Gradients(NamedTuple):
    """Outgoing gradients, in the shapes of their tensors.

    Attributes:
        x: gradient of x (N, I), or None.
        state: gradient of every part of the initial state with a gradient.
        weights: gradients of the weights.
    """

    x: Tensor | None
    state: State
    weights: tuple[Tensor, ...]


class Description(NamedTuple):
    """Description of a backend for ``explain``.

    Attributes:
        forward: the kernels of the forward pass.
        backward: the kernels of the backward pass.
        why: why the backend supports the layer.
        saves_gates: whether the gates are saved for the backward pass, ``Cell.saved_values`` per row and unit.
        saves_states: whether the parts of the state besides h are saved for the backward pass.
        recomputes_gates: whether the backward pass recomputes the gates, which costs two products.
        recomputes_jacobian: whether every round of corrections recomputes diag(J), which costs a product if the cell
            projects h.
    """

    forward: str
    backward: str
    why: str
    saves_gates: bool = False
    saves_states: bool = False
    recomputes_gates: bool = False
    recomputes_jacobian: bool = False


class Backend(NamedTuple):
    """One row of the table of backends.

    Attributes:
        name: key in the table.
        unsupported_reason: (cell, tensors, exact) -> why the backend does not support a layer, or None. ``tensors`` are
            x, the initial states and the weights; ``exact`` is whether the rule is exact.
        forward: (problems, save) -> one ``Forward`` per direction; problems differ in weights, state and ``reverse``.
        recompute: (problem, forward) -> the same ``Forward`` with complete ``saved``.
        mean_jacobian: (problem, recomputed) -> the mean of diag(J[t]) over all rows, (S,).
        backward: (problem, recomputed, upstream, rule, needs_x) -> ``Gradients``; may overwrite ``recomputed.saved``.
        device: type of device that it has kernels for; None for any device.
        describe: (cell, x, exact) -> ``Description``.
        upcasts: whether y and the final states stay float32 under autocast.
        saves: whether the backward pass needs tensors that the backend's own forward pass saved, and not y alone.
        fused_forward: whether the forward pass is used without autograd too; otherwise torch's own layer runs, if torch
            has the cell.
        fallback: whether torch's own layer, if torch has the cell, is preferred under an exact rule.
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
    """Run every direction in the order of processing; y is returned in natural order, ``saved`` unchanged."""
    found = []
    for problem in problems:
        done = run(in_order(problem), save)
        found.append(done._replace(y=problem.layout.reverse(done.y)) if problem.reverse else done)
    return found


def in_order(problem: Problem) -> Problem:
    """The problem with its rows in the order of processing."""
    return problem._replace(x=problem.layout.reverse(problem.x), reverse=False) if problem.reverse else problem


def backward_in_order(
    run: Callable[[Problem, Forward, Upstream, KernelRule, bool], Gradients],
    problem: Problem,
    done: Forward,
    upstream: Upstream,
    rule: KernelRule,
    needs_x: bool,
) -> Gradients:
    """Run the backward pass of a direction in the order of processing; ``saved`` must be in that order."""
    if not problem.reverse:
        return run(problem, done, upstream, rule, needs_x)
    reverse = problem.layout.reverse
    done, upstream = done._replace(y=reverse(done.y)), upstream._replace(y=reverse(upstream.y))
    if rule.name == "per_row" and rule.diagonal is not None:
        rule = rule._replace(diagonal=reverse(rule.diagonal))
    found = run(in_order(problem), done, upstream, rule, needs_x)
    return found if found.x is None else found._replace(x=reverse(found.x))
