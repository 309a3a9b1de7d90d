"""What every layer with a feedback rule has: the rule, what a learned rule stores, and how both go away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from statefeed.cells.protocol import Cell
from statefeed.feedback import Feedback, FeedbackLike, LearnedState, as_feedback
from statefeed.newton import Newton, as_forward_method

_LEARNED = ("diagonal", "diagonal_updates")
TORCH, BPTT = Feedback("torch"), Feedback("bptt")


class FeedbackLayer(nn.Module):
    """A module with a feedback rule; the base of RNN, GRU, LSTM and Recurrent.

    A subclass says with which cell, how wide its state is and how many layers and directions it has. What a learned
    rule stores is in the attributes ``diagonal`` (rows, S) and ``diagonal_updates`` (rows,): they follow ``.to``,
    copies and pickles as buffers do. They are no buffers, because a module must have the same buffers under every rule:
    averaged copies of a model pair them by position, and DistributedDataParallel broadcasts them.
    """

    diagonal: Tensor
    diagonal_updates: Tensor
    _feedback: Feedback
    _rules: tuple[Feedback, ...]  # of every layer and direction
    # Defaults of the class, which swapped layers and old pickles have; None is sequential.
    _newton: Newton | None = None
    newton_iterations: tuple[int, ...] = ()
    newton_sequential_steps: tuple[int, ...] = ()

    @property
    def feedback(self) -> Feedback:
        """The rule of the backward pass; settable at any time, in every spelling of ``Feedback``."""
        return self._feedback

    @feedback.setter
    def feedback(self, rule: FeedbackLike) -> None:
        feedback = as_feedback(rule)
        reason = self.unsupported_reason(feedback) or self.unsupported_forward(self._newton, feedback)
        if reason is not None:
            raise ValueError(reason)
        if feedback.learned and not self.learned_tensors():
            like = next(self.parameters(), torch.empty(0, device="cpu"))
            # Not like.new_zeros: a sharded parameter would make a sharded diagonal.
            shape = (self._feedback_rows, self._state_size)
            self.diagonal = torch.zeros(shape, dtype=like.dtype, device=like.device)
            self.diagonal_updates = torch.zeros(shape[0], dtype=torch.int64, device=like.device)
        self._feedback = feedback
        self._rules = tuple(feedback.row(k) for k in range(self._feedback_rows))
        self._rule_changed()

    def _rule_changed(self) -> None:
        """Called after the rule or the forward method was set."""

    @property
    def forward_method(self) -> str | Newton:
        """``"sequential"``, or ``Newton``: the forward pass is parallel over time; settable at any time.

        ``newton_iterations`` has the iterations that the last call took, per layer and direction, and
        ``newton_sequential_steps`` the steps that did not converge and were run one after the other.
        """
        return "sequential" if self._newton is None else self._newton

    @forward_method.setter
    def forward_method(self, method: str | Newton) -> None:
        value = as_forward_method(method)
        reason = self.unsupported_forward(value, self._feedback)
        if reason is not None:
            raise ValueError(reason)
        self._reset_forward_method()
        if value is not None:
            self._newton = value
        self._rule_changed()

    def unsupported_forward(self, method: Newton | None, rule: Feedback) -> str | None:
        """Why the layer cannot run by a forward method under a rule, in one sentence; None if it can."""
        if method is None:
            return None
        return (
            f'forward_method of {type(self).__name__} must be "sequential", got "{method}": parallel iteration needs '
            "the formulas of a Cell, as RNN, GRU, LSTM and CellLayer have"
        )

    def _reset_forward_method(self) -> None:
        for name in ("_newton", "newton_iterations", "newton_sequential_steps"):
            self.__dict__.pop(name, None)

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
        complex_dtype = next((p.dtype for p in self.parameters() if p.is_complex()), None)
        reason = None if complex_dtype is None else self.complex_reason(rule, complex_dtype)
        return reason or rule.unsupported_reason(self.feedback_cell, self._state_size, self._feedback_rows)

    def complex_reason(self, rule: Feedback, dtype: torch.dtype) -> str | None:
        """Why the layer cannot run under a rule with weights of a complex dtype; None if it can."""
        return None if rule.exact else complex_reason(rule, dtype)

    def learned_tensors(self) -> dict[str, Tensor]:
        """What learned rules have stored, by attribute; backward passes change it in place."""
        return {name: self.__dict__[name] for name in _LEARNED if name in self.__dict__}

    def learned_state(self, row: int, device: torch.device) -> LearnedState | None:
        """What a learned rule stores for one layer and direction, on a device; None under the other rules."""
        if not self._feedback.learned:
            return None
        if self.diagonal.device != device:  # of a module whose parameters were moved one by one
            self.diagonal, self.diagonal_updates = self.diagonal.to(device), self.diagonal_updates.to(device)
        return LearnedState(self.diagonal[row], self.diagonal_updates[row], self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``.to``, ``.half`` and their like call: what was learned follows the parameters."""
        first = next(self.parameters(), None)
        if first is not None and "_feedback" in self.__dict__:
            dtype = fn(torch.empty(0, dtype=first.dtype, device=first.device)).dtype
            reason = self.complex_reason(self._feedback, dtype) if dtype.is_complex else None
            if reason is not None:  # before anything has changed
                raise ValueError(reason)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, tensor in self.learned_tensors().items():
                setattr(self, name, fn(tensor))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in _LEARNED:  # which version 0.1 pickled as buffers
            buffer = self._buffers.pop(name, None)
            if buffer is not None:
                self._non_persistent_buffers_set.discard(name)
                setattr(self, name, buffer)

    @contextmanager
    def exact_rule(self) -> Iterator[None]:
        """Within the block the gradient is exact, also in eval mode, where cuDNN has no backward pass."""
        rule, training, dropout = self._feedback, self.training, getattr(self, "dropout", None)
        method = self.__dict__.pop("_newton", None)
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
            if method is not None:
                self._newton = method

    def reset_diagonal(self) -> None:
        """Forget what was learned about the diagonal."""
        for tensor in self.learned_tensors().values():
            tensor.zero_()

    def remove_feedback(self) -> None:
        """Remove the rule and what was learned, so that the class can be set to a plain layer's."""
        del self._feedback, self._rules
        self._reset_forward_method()
        for name in self.learned_tensors():
            delattr(self, name)

    def feedback_repr(self) -> str:
        """The rule, and a forward method that is not the default, as ``extra_repr`` prints them."""
        method = "" if self._newton is None else f", forward_method={str(self._newton)!r}"
        return f"feedback={str(self._feedback)!r}{method}"


def complex_reason(rule: Feedback, dtype: torch.dtype) -> str:
    """Why an approximate rule cannot run on complex numbers."""
    return f'feedback "{rule}" is defined for real numbers, got {dtype}: set feedback to "torch"'
