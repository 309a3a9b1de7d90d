"""Interface of diagonals: the base classes of all rules, and the form of a rule that backends receive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell
from statefeed.layout import Layout


class KernelRule(NamedTuple):
    """A feedback rule in the form that backends receive, for one layer and direction.

    Attributes:
        name: ``"exact"``, ``"stationary"``, ``"per_row"``, ``"direct"`` or ``"jacobian"``.
        diagonal: D of shape (S,) for ``"stationary"`` and (N, S), one row of D for every row of the batch, for
            ``"per_row"``; None otherwise.
        corrections: k, the number of corrections.
    """

    name: str
    diagonal: Tensor | None = None
    corrections: int = 0


EXACT = KernelRule("exact")


class Linearization(NamedTuple):
    """A cell linearized at the states of one forward pass, the input of time-varying rules.

    Attributes:
        cell: the cell.
        at: the NamedTuple that ``cell.linearize`` returned, rows in natural time order.
        w_hh: recurrent weights as ``cell.jacobian_diagonal`` takes them.
        sizes: width of every part of the state with a gradient.
        layout: positions of the rows in time.
        reverse: whether the direction runs from the last step to the first.
    """

    cell: Cell
    at: Any
    w_hh: Tensor
    sizes: tuple[int, ...]
    layout: Layout
    reverse: bool

    def over_time(self, rows: Tensor) -> Tensor:
        """Rows (N, width) as (T, B, width) in the order of processing, zero after the end of a sequence."""
        return self.layout.grid(self.layout.reverse(rows) if self.reverse else rows)

    def as_rows(self, grid: Tensor) -> Tensor:
        """Rows (N, width) of a grid (T, B, width); the inverse of ``over_time``."""
        rows = self.layout.rows(grid)
        return self.layout.reverse(rows) if self.reverse else rows


class LearnedState(NamedTuple):
    """The tensors that a learned diagonal stores, for one layer and direction.

    Attributes:
        diagonal: D, (S,), updated in place.
        updates: int64 scalar, number of counted training backward passes, updated in place.
        training: whether the layer is in training mode, so that this backward pass is counted.
    """

    diagonal: Tensor
    updates: Tensor
    training: bool


class Context(NamedTuple):
    """Inputs from which a rule computes its diagonal in a backward pass; the functions compute on demand.

    Attributes:
        size: S, the width of the state.
        dtype: dtype of D.
        device: device of D.
        mean_jacobian: computes the mean of diag(J[t]) over all rows, (S,).
        linearize: computes the ``Linearization`` at the states of the forward pass; costs two products.
        learned: the stored tensors of a learned rule; None for other rules.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    mean_jacobian: Callable[[], Tensor]
    linearize: Callable[[], Linearization]
    learned: LearnedState | None = None


class Diagonal(ABC):
    """Base class of the diagonals that approximate the state Jacobian; immutable, and compared by value.

    ``str`` returns its spelling, under which a layer stores what a learned diagonal has learned.

    Attributes:
        exact: whether the gradient is exact, with the full Jacobian.
        learned: whether a layer must store a ``LearnedState`` for it.
        is_jacobian: whether it is diag(J[t]), which costs products if the cell projects h.
        largest: largest absolute value if known in advance, else 0; large values cause a warning about corrections.
    """

    exact: bool = False
    learned: bool = False
    is_jacobian: bool = False

    @property
    def largest(self) -> float:
        return 0.0

    def unsupported_reason(self, cell: Cell | None, size: int, rows: int) -> str | None:
        """Why a layer does not support this diagonal.

        Args:
            cell: the cell; None in ``statefeed.Recurrent``, where only its step function is known.
            size: S, the width of the state.
            rows: number of layers times number of directions.

        Returns:
            The reason in one sentence; None if the layer supports it.
        """
        return None

    def row(self, k: int) -> Diagonal:
        """The diagonal of layer and direction k, ``k = layer * directions + direction``."""
        return self

    def vector(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """D of shape (size,) if it is known in advance, else None."""
        return None

    @abstractmethod
    def resolve(self, context: Context) -> KernelRule:
        """The rule in the form that backends receive, without corrections."""

    @abstractmethod
    def __str__(self) -> str:
        """The spelling: the name in the table of rules, with the number of a rule that takes one."""


class Stationary(Diagonal):
    """Base class of fixed diagonals; a subclass defines ``vector``."""

    @abstractmethod
    def vector(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """D of shape (size,)."""

    def resolve(self, context: Context) -> KernelRule:
        return KernelRule("stationary", self.vector(context.size, context.dtype, context.device))


class TimeVarying(Diagonal):
    """Base class of diagonals that depend on the step; a subclass defines ``rows``, and needs no kernel."""

    def unsupported_reason(self, cell: Cell | None, size: int, rows: int) -> str | None:
        if cell is None:
            return (
                f'feedback "{self}" needs the formulas of a cell, which statefeed.Recurrent does not have: use '
                '"jacobian"'
            )
        return None

    @abstractmethod
    def rows(self, at: Linearization) -> Sequence[Tensor | None]:
        """D of every row, (N, width) for every part of the state with a gradient; None means zero."""

    def resolve(self, context: Context) -> KernelRule:
        at = context.linearize()
        parts, count = self.rows(at), len(at.at[0])
        got = [None if part is None else tuple(part.shape) for part in parts]
        expected = [(count, size) for size in at.sizes]
        if len(got) != len(expected) or any(g not in (None, e) for g, e in zip(got, expected, strict=True)):
            raise ValueError(f'rows of feedback "{self}" must have the shapes {expected} or None, got {got}')
        zeros = (at.w_hh.new_zeros(shape) for shape in expected)
        filled = [zero if part is None else part for part, zero in zip(parts, zeros, strict=True)]
        return KernelRule("per_row", torch.cat(filled, -1).to(context.dtype))


class Learned(Diagonal):
    """Base class of stationary diagonals that are learned in training; a subclass defines ``observe``."""

    learned = True
    # Whether some training passes are exact and call ``fit``.
    takes_exact_passes: bool = False

    @abstractmethod
    def observe(self, state: LearnedState, mean_jacobian: Callable[[], Tensor]) -> Tensor:
        """Update the state if ``state.training``, and return D for this backward pass, (S,)."""

    def wants_exact(self, state: LearnedState) -> bool:
        """Whether this backward pass must be exact BPTT, followed by ``fit``."""
        return False

    def fit(self, state: LearnedState, delta: Sequence[Tensor], grad_prev: Sequence[Tensor]) -> None:
        """Update the state from an exact pass.

        Args:
            state: updated in place.
            delta: exact gradients of the states, one tensor (..., width) per part of the state.
            grad_prev: the gradients J^T delta that they pass to the previous states.
        """
        raise NotImplementedError

    def resolve(self, context: Context) -> KernelRule:
        if context.learned is None:
            raise RuntimeError(f'feedback "{self}" needs the diagonal that a layer stores, got none')
        return KernelRule("stationary", self.observe(context.learned, context.mean_jacobian))
