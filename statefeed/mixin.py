"""Base class of every layer with a feedback rule: the rule, and the tensors that a learned rule stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from statefeed import newton
from statefeed.cells.protocol import Cell
from statefeed.feedback import Feedback, FeedbackLike, LearnedState, as_feedback
from statefeed.newton import Newton, as_forward_method

_LEARNED = ("diagonal", "diagonal_updates")
TORCH, BPTT = Feedback("torch"), Feedback("bptt")


class FeedbackLayer(nn.Module):
    """Base class of every module with a feedback rule: RNN, GRU, LSTM, CellLayer and Recurrent.

    A subclass defines its cell, the width S of its state, and its number of layers and directions. A learned rule
    stores its tensors in the attributes ``diagonal`` (L * directions, S) and ``diagonal_updates`` (L * directions,).
    Each learned rule has its own, which start from zeros and are stored under other rules; the attributes
    are those of the learned rule set last. Corrections do not change what is learned: ``"fitted+1"`` after ``"fitted"``
    continues with the same tensors.

    The tensors follow ``.to``, copies and pickles as buffers do, and ``diagonal`` is at least float32. They are not
    buffers, because a module must have the same buffers under every rule: averaged copies of a model match buffers by
    position, and DistributedDataParallel broadcasts them.

    Gradient: that of ``feedback``.

    Example:
        >>> from torch import nn
        >>> import statefeed as sf
        >>> model = nn.Sequential(sf.GRU(2, 3, feedback="dsf"), nn.Flatten())
        >>> [str(m.feedback) for m in model.modules() if isinstance(m, sf.FeedbackLayer)]
        ['dsf']
    """

    diagonal: Tensor
    diagonal_updates: Tensor
    _feedback: Feedback
    _rules: tuple[Feedback, ...]  # of every layer and direction
    _learned_rule: str | None = None  # the diagonal that ``diagonal`` and ``diagonal_updates`` belong to
    _other_learned: dict[str, dict[str, Tensor]]  # the tensors of other learned diagonals, by spelling
    # Defaults of the class, which swapped layers and old pickles have; None is sequential.
    _newton: Newton | None = None
    newton_iterations: tuple[int, ...] = ()
    newton_sequential_steps: tuple[int, ...] = ()
    newton_states: tuple[Tensor, ...] = ()
    newton_guess: tuple[Tensor, ...] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a parameter or module under these names and bypass the properties.
        if name in ("feedback", "forward_method"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def feedback(self) -> Feedback:
        """The rule of the backward pass; settable at any time, in any spelling of ``Feedback``."""
        return self._feedback

    @feedback.setter
    def feedback(self, rule: FeedbackLike) -> None:
        feedback = as_feedback(rule)
        reason = self.unsupported_rule(feedback)
        if reason is not None:
            raise ValueError(reason)
        if feedback.learned:
            self._use_learned(str(feedback.diagonal))
        self._feedback = feedback
        self._rules = tuple(feedback.row(k) for k in range(self._feedback_rows))
        self._rule_changed()

    def unsupported_rule(self, rule: Feedback) -> str | None:
        """Why the layer does not support a rule with its present forward method.

        Args:
            rule: any rule.

        Returns:
            The reason in one sentence; None if ``layer.feedback = rule`` succeeds.
        """
        return self.unsupported_reason(rule) or self.unsupported_forward(self._newton, rule)

    def _rule_changed(self) -> None:
        """Hook for subclasses, called after the rule or the forward method was set."""

    @property
    def forward_method(self) -> str | Newton:
        """``"sequential"``, or a ``Newton`` for a forward pass that is parallel over time; settable at any time.

        After a call, ``newton_iterations`` has the number of iterations per layer and direction, and
        ``newton_sequential_steps`` the number of steps that did not converge and ran sequentially. The iteration starts
        from zeros, or from ``newton_guess``: one tensor (T, B, H), or packed rows (N, H), for every layer and
        direction, which the next call uses and removes. With ``Newton(keep_states=True)`` the attribute
        ``newton_states`` has these tensors after a call.
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
        """Why the layer does not support a forward method under a rule.

        Args:
            method: a ``Newton``; None for the sequential method.
            rule: any rule.

        Returns:
            The reason in one sentence; None if the layer supports both together.
        """
        if method is None:
            return None
        return (
            f'forward_method of {type(self).__name__} must be "sequential", got "{method}": parallel iteration needs '
            "the formulas of a Cell, as RNN, GRU, LSTM and CellLayer have"
        )

    def _reset_forward_method(self) -> None:
        for name in ("_newton", "newton_iterations", "newton_sequential_steps", "newton_states", "newton_guess"):
            self.__dict__.pop(name, None)

    @property
    def feedback_cell(self) -> Cell | None:
        """The cell; None if only its step function is known."""
        raise NotImplementedError

    @property
    def _state_size(self) -> int:
        """S, the width of the state."""
        raise NotImplementedError

    @property
    def _feedback_rows(self) -> int:
        """Number of layers times number of directions."""
        return 1

    def unsupported_reason(self, rule: Feedback) -> str | None:
        """Why the layer does not support a rule.

        Args:
            rule: any rule.

        Returns:
            The reason in one sentence; None if the layer supports the rule.
        """
        complex_dtype = self.complex_dtype
        reason = None if complex_dtype is None else self.complex_reason(rule, complex_dtype)
        return reason or rule.unsupported_reason(self.feedback_cell, self._state_size, self._feedback_rows)

    @property
    def complex_dtype(self) -> torch.dtype | None:
        """The dtype of complex weights; None if all weights are real."""
        return next((p.dtype for p in self.parameters() if p.is_complex()), None)

    def complex_reason(self, rule: Feedback, dtype: torch.dtype) -> str | None:
        """Why the layer does not support a rule with complex weights.

        Args:
            rule: any rule.
            dtype: complex dtype of the weights.

        Returns:
            The reason in one sentence; None if the layer supports it.
        """
        return None if rule.exact else complex_reason(rule, dtype)

    def learned_tensors(self) -> dict[str, Tensor]:
        """The tensors of the learned rule set last, by attribute name; backward passes update them in place."""
        return {name: self.__dict__[name] for name in _LEARNED if name in self.__dict__}

    def learned_by_rule(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every learned rule that was set, as ``learned_tensors`` returns them, by spelling of D.

        Example:
            >>> import statefeed as sf
            >>> layer = sf.GRU(2, 3, feedback="calibrated+1")
            >>> layer.feedback = "fitted"
            >>> list(layer.learned_by_rule())
            ['calibrated', 'fitted']
        """
        stored = dict(self.__dict__.get("_other_learned", {}))
        if self._learned_rule is not None:
            stored[self._learned_rule] = self.learned_tensors()
        return dict(sorted(stored.items()))

    def _use_learned(self, diagonal: str) -> None:
        """Make the tensors of a learned diagonal those of the attributes; zeros at its first use."""
        current = self.learned_tensors()
        if current and self._learned_rule in (None, diagonal):  # None in an old pickle under another rule
            self._learned_rule = diagonal
            return
        others = self.__dict__.setdefault("_other_learned", {})
        if self._learned_rule is not None:
            others[self._learned_rule] = current
        for name, tensor in (others.pop(diagonal, None) or self._new_learned()).items():
            setattr(self, name, tensor)
        self._learned_rule = diagonal

    def _new_learned(self) -> dict[str, Tensor]:
        like = next(self.parameters(), torch.empty(0, device="cpu"))
        # Not like.new_zeros: a sharded parameter would make a sharded diagonal.
        shape = (self._feedback_rows, self._state_size)
        with torch.inference_mode(False):  # a backward pass cannot update an inference tensor
            return {
                "diagonal": torch.zeros(shape, dtype=_learned_dtype(like.dtype), device=like.device),
                "diagonal_updates": torch.zeros(shape[0], dtype=torch.int64, device=like.device),
            }

    def learned_state(self, row: int, device: torch.device) -> LearnedState | None:
        """The tensors that a learned rule stores for one layer and direction.

        Args:
            row: index of the layer and direction, ``layer * directions + direction``.
            device: device of the returned tensors.

        Returns:
            Views that a backward pass updates in place; None under a rule that is not learned.
        """
        if not self._feedback.learned:
            return None
        if self.diagonal.device != device:  # the parameters were moved one by one, not by ``.to``
            with torch.inference_mode(False):
                self.diagonal, self.diagonal_updates = self.diagonal.to(device), self.diagonal_updates.to(device)
        return LearnedState(self.diagonal[row], self.diagonal_updates[row], self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Called by ``.to``, ``.half`` and similar methods: the learned tensors follow the parameters."""
        first = next(self.parameters(), None)
        if first is not None and "_feedback" in self.__dict__:
            dtype = fn(torch.empty(0, dtype=first.dtype, device=first.device)).dtype
            reason = None
            if dtype.is_complex and self._newton is not None:
                reason = self.complex_reason(BPTT, dtype) or newton.complex_reason(self._newton, dtype)
            elif dtype.is_complex:
                reason = self.complex_reason(self._feedback, dtype)
            if reason is not None:  # before anything has changed
                raise ValueError(reason)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, tensor in self.learned_tensors().items():
                setattr(self, name, _moved(tensor, fn))
            for tensors in self.__dict__.get("_other_learned", {}).values():
                tensors.update({name: _moved(tensor, fn) for name, tensor in tensors.items()})
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in _LEARNED:  # version 0.1 pickled them as buffers
            buffer = self._buffers.pop(name, None)
            if buffer is not None:
                self._non_persistent_buffers_set.discard(name)
                setattr(self, name, buffer)
        if self._learned_rule is None and "_feedback" in state and self._feedback.learned:
            self._learned_rule = str(self._feedback.diagonal)  # older pickles do not have it

    @contextmanager
    def exact_rule(self) -> Iterator[None]:
        """Context manager that makes the gradient exact, also in eval mode, where cuDNN has no backward pass."""
        rule, training, dropout = self._feedback, self.training, getattr(self, "dropout", None)
        method = self.__dict__.pop("_newton", None)
        # torch's own layer if torch has the cell: it is independent of our kernels.
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
        """Set the learned diagonals of all rules, and their numbers of updates, to zero."""
        for tensors in self.learned_by_rule().values():
            for tensor in tensors.values():
                tensor.zero_()

    def remove_feedback(self) -> None:
        """Remove the rule and the learned tensors, so that the object can become a plain torch.nn layer again."""
        del self._feedback, self._rules
        self._reset_forward_method()
        for name in (*_LEARNED, "_learned_rule", "_other_learned"):
            self.__dict__.pop(name, None)

    def feedback_repr(self) -> str:
        """The rule, and a forward method that is not the default, as ``extra_repr`` prints them."""
        method = "" if self._newton is None else f", forward_method={str(self._newton)!r}"
        return f"feedback={str(self._feedback)!r}{method}"


def _learned_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a learned diagonal: small weights of a running mean have no effect in bfloat16 or float16."""
    return torch.promote_types(dtype, torch.float32)


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """A learned tensor after a function of ``_apply``, without a loss of precision."""
    moved = fn(tensor)
    if tensor.is_meta and not moved.is_meta:  # ``to_empty`` leaves any values, and no state_dict replaces them
        return torch.zeros(moved.shape, dtype=tensor.dtype, device=moved.device)
    if not moved.is_floating_point() or moved.dtype == _learned_dtype(moved.dtype):
        return moved
    return tensor.to(device=moved.device, dtype=_learned_dtype(moved.dtype))


def complex_reason(rule: Feedback, dtype: torch.dtype) -> str:
    """The error message for an approximate rule on complex numbers."""
    return f'feedback "{rule}" is defined for real numbers, got {dtype}: set feedback to "torch"'
