"""Base class of layers of other packages that ``swap`` has converted."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from statefeed.backends import choose
from statefeed.cells import Cell, State
from statefeed.feedback import Feedback
from statefeed.layout import Layout
from statefeed.mixin import FeedbackLayer
from statefeed.recurrence import Direction, recurrence


class ConvertedLayer(FeedbackLayer):
    """Base class of the methods that replace those of another package's class.

    A converted object keeps its attributes, parameters and hooks, and stays an instance of its class. A subclass
    defines the cell, its size, and a ``forward`` with the arguments and results of the other class, which calls
    ``feedback_run``.

    Attributes:
        plain_class: the class of the other package, which ``restore`` gives back.
    """

    plain_class: ClassVar[type[nn.Module]]

    @classmethod
    @abstractmethod
    def unsupported_module(cls, module: nn.Module) -> str | None:
        """Why an object of the other package cannot be converted.

        Args:
            module: the object before conversion.

        Returns:
            The reason in one sentence; None if it can.
        """

    @property
    @abstractmethod
    def feedback_cell(self) -> Cell:
        """The cell."""

    @property
    @abstractmethod
    def feedback_units(self) -> int:
        """H, number of units of the cell."""

    @property
    def _state_size(self) -> int:
        cell = self.feedback_cell
        return sum(cell.state_widths(self.feedback_units)[: cell.gradient_parts])

    def feedback_run(self, x: Tensor, state: State, weights: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        """Run the cell over a sequence under the rule.

        Args:
            x: inputs (T, B, I), or preactivations (T, B, G*H) if w_ih is an empty vector.
            state: initial state, (B, width) for every part.
            weights: w_ih, w_hh and, with biases, b_ih and b_hh, in the forms of ``statefeed.backends.Problem``.

        Returns:
            h after every step (T, B, H), and the final state.

        Gradient: that of ``feedback``.
        """
        cell = self.feedback_cell
        backend = choose(cell, (x, *state, *weights), self._feedback.exact).name
        direction = Direction(state, weights, self._rules[0], self.learned_state(0, x.device))
        y, (final,) = recurrence(cell, backend, x, Layout(x.shape[0], x.shape[1]), [direction])
        return y, final

    def unsupported_reason(self, rule: Feedback) -> str | None:
        """Why the layer does not support a rule, in one sentence; None if it does."""
        if rule.through_torch:
            return f'feedback "torch" needs a layer of torch.nn, which has no {type(self).__name__}: use "bptt"'
        return super().unsupported_reason(rule)

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}, {self.feedback_repr()})"
