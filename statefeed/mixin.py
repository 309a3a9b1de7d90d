"""What every layer with a feedback rule has: the rule, what a learned rule stores, and how both go away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from statefeed.cells.protocol import Cell
from statefeed.feedback import Feedback, FeedbackLike, LearnedState, as_feedback

_BUFFERS = ("diagonal", "diagonal_updates")
TORCH, BPTT = Feedback("torch"), Feedback("bptt")


class FeedbackLayer(nn.Module):
    """A module with a feedback rule; the base of RNN, GRU, LSTM and Recurrent.

    A subclass says with which cell, how wide its state is and how many layers and directions it has. Learned diagonals
    are in the buffers ``diagonal`` (rows, S) and ``diagonal_updates`` (rows,), which are not in ``state_dict``.
    """

    _feedback: Feedback
    _rules: tuple[Feedback, ...]  # of every layer and direction

    @property
    def feedback(self) -> Feedback:
        """The rule of the backward pass; settable at any time, in every spelling of ``Feedback``."""
        return self._feedback

    @feedback.setter
    def feedback(self, rule: FeedbackLike) -> None:
        feedback = as_feedback(rule)
        reason = self.unsupported_reason(feedback)
        if reason is not None:
            raise ValueError(reason)
        if feedback.learned and "diagonal" not in self._buffers:
            like = next(self.parameters(), torch.empty(0))
            diagonal = like.new_zeros(self._feedback_rows, self._state_size)
            self.register_buffer("diagonal", diagonal, persistent=False)
            updates = torch.zeros(self._feedback_rows, dtype=torch.int64, device=like.device)
            self.register_buffer("diagonal_updates", updates, persistent=False)
        self._feedback = feedback
        self._rules = tuple(feedback.row(k) for k in range(self._feedback_rows))
        self._rule_changed()

    def _rule_changed(self) -> None:
        """Called after the rule was set."""

    @property
    def feedback_cell(self) -> Cell | None:
        """The cell, None where only its step is known."""
        raise NotImplementedError

    @property
    def _state_size(self) -> int:
        """S, the width of the state."""
        raise NotImplementedError

    @property
    def _feedback_rows(self) -> int:
        """Layers times directions."""
        return 1

    def unsupported_reason(self, rule: Feedback) -> str | None:
        """Why the layer cannot run under a rule, in one sentence; None if it can."""
        return rule.unsupported_reason(self.feedback_cell, self._state_size, self._feedback_rows)

    def learned_state(self, row: int) -> LearnedState | None:
        """What a learned rule stores for one layer and direction; None under the other rules."""
        if not self._feedback.learned:
            return None
        diagonal: Tensor = self.diagonal  # type: ignore[assignment]
        updates: Tensor = self.diagonal_updates  # type: ignore[assignment]
        return LearnedState(diagonal[row], updates[row], self.training)

    @contextmanager
    def exact_rule(self) -> Iterator[None]:
        """Within the block the gradient is exact, also in eval mode, where cuDNN has no backward pass."""
        rule, training, dropout = self._feedback, self.training, getattr(self, "dropout", None)
        # torch's own layer where there is one, which is independent of our kernels.
        self.feedback = TORCH if self.unsupported_reason(TORCH) is None else BPTT
        if not training and dropout is not None:
            self.training, self.dropout = True, 0.0
        try:
            yield
        finally:
            if not training and dropout is not None:
                self.training, self.dropout = training, dropout
            self.feedback = rule

    def reset_diagonal(self) -> None:
        """Forget what was learned about the diagonal."""
        for name in _BUFFERS:
            buffer = self._buffers.get(name)
            if buffer is not None:
                buffer.zero_()

    def remove_feedback(self) -> None:
        """Remove the rule and what was learned, so that the class can be set to a plain layer's."""
        del self._feedback, self._rules
        for name in _BUFFERS:
            if self._buffers.pop(name, None) is not None:
                self._non_persistent_buffers_set.discard(name)

    def feedback_repr(self) -> str:
        """The rule as ``extra_repr`` prints it."""
        return f"feedback={str(self._feedback)!r}"
