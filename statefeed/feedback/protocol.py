"""What a diagonal is to the rest of the package: a member of the table of rules, and its form for the backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell


class KernelRule(NamedTuple):
    """A feedback rule as the backends take it, for one layer and direction.

    Attributes:
        name: ``"exact"``, ``"stationary"``, ``"per_row"``, ``"direct"`` or ``"jacobian"``.
        diagonal: D of shape (S,) for ``"stationary"`` and (N, S), one row of D for every row of the batch, for
            ``"per_row"``; None otherwise.
        corrections: k.
    """

    name: str
    diagonal: Tensor | None = None
    corrections: int = 0


EXACT = KernelRule("exact")


class Linearization(NamedTuple):
    """A cell at the states of one forward pass: what a time-varying rule computes its diagonal from."""

    cell: Cell
    at: Any
    w_hh: Tensor


class LearnedState(NamedTuple):
    """What a learned diagonal stores in a layer, for one layer and direction.

    Attributes:
        diagonal: D, (S,), changed in place.
        updates: int64 scalar, training backward passes that have been counted, changed in place.
        training: whether this backward pass counts.
    """

    diagonal: Tensor
    updates: Tensor
    training: bool


class Context(NamedTuple):
    """What a rule may ask for when a backward pass needs its diagonal; nothing is computed unless it asks.

    Attributes:
        size: S, the width of the state.
        dtype: of D.
        device: of D.
        mean_jacobian: computes the mean of diag(J[t]) over all rows, (S,).
        linearize: computes the ``Linearization`` at the states of the forward pass; costs two products.
        learned: the stored diagonal of a learned rule, None for the others.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    mean_jacobian: Callable[[], Tensor]
    linearize: Callable[[], Linearization]
    learned: LearnedState | None = None


class Diagonal(ABC):
    """What stands in for the state Jacobian; a value, compared by content, printed as it is spelled.

    Attributes:
        exact: whether it is no approximation.
        learned: whether a layer must store a ``LearnedState`` for it.
        largest: the largest absolute value if it is known beforehand; decides the warning about corrections.
    """

    exact: bool = False
    learned: bool = False

    @property
    def largest(self) -> float:
        return 0.0

    def unsupported_reason(self, cell: Cell | None, size: int, rows: int) -> str | None:
        """Why a layer cannot run under this diagonal, None if it can.

        Args:
            cell: None for a cell of a user's own, of which only the step is known.
            size: S, the width of the state.
            rows: layers times directions.
        """
        return None

    def row(self, k: int) -> Diagonal:
        """The diagonal of layer and direction k."""
        return self

    def vector(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """D of shape (size,) where it is known beforehand, else None."""
        return None

    @abstractmethod
    def resolve(self, context: Context) -> KernelRule:
        """The form that a backend takes."""


class Stationary(Diagonal):
    """A fixed diagonal: ``vector`` gives it."""

    @abstractmethod
    def vector(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """D of shape (size,)."""

    def resolve(self, context: Context) -> KernelRule:
        return KernelRule("stationary", self.vector(context.size, context.dtype, context.device))


class TimeVarying(Diagonal):
    """A diagonal that is computed at every step: ``rows`` gives it, and no kernel needs to know the rule."""

    @abstractmethod
    def rows(self, at: Linearization) -> Sequence[Tensor]:
        """D of every row, (N, width) for every part of the state."""

    def resolve(self, context: Context) -> KernelRule:
        return KernelRule("per_row", torch.cat(list(self.rows(context.linearize())), -1).to(context.dtype))


class Learned(Diagonal):
    """A stationary diagonal that is learned while training: it observes backward passes and returns D."""

    learned = True
    # Whether some training passes are exact, and end in ``fit``.
    takes_exact_passes: bool = False

    @abstractmethod
    def observe(self, state: LearnedState, mean_jacobian: Callable[[], Tensor]) -> Tensor:
        """D for this backward pass, (S,); counts the pass if ``state.training``."""

    def wants_exact(self, state: LearnedState) -> bool:
        """Whether this backward pass must be exact BPTT and end in ``fit``."""
        return False

    def fit(self, state: LearnedState, delta: Sequence[Tensor], grad_prev: Sequence[Tensor]) -> None:
        """Learn from an exact pass.

        Args:
            state: changed in place.
            delta: exact gradient of every state, rows (..., S) in parts along S.
            grad_prev: what each of them passes to the state before it.
        """
        raise NotImplementedError

    def resolve(self, context: Context) -> KernelRule:
        if context.learned is None:
            raise RuntimeError(f'feedback "{self}" needs the diagonal that a layer stores, got none')
        return KernelRule("stationary", self.observe(context.learned, context.mean_jacobian))
