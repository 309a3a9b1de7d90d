"""Recurrent layer for any user-defined cell, state' = cell(x, state), with a feedback rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from statefeed.custom.check import check_cell
from statefeed.custom.gradient import Call, Custom, EagerCustom
from statefeed.custom.steps import StepFunction, Steps, compile_step, steps_of
from statefeed.feedback import Feedback, FeedbackLike
from statefeed.mixin import FeedbackLayer, complex_reason
from statefeed.recurrence import autocast_dtype
from statefeed.transforms import NO_EXPANDED_STEP, NO_TRANSFORM_OF_A_STEP, is_expanded, is_transformed, traced
from statefeed.user_warning import warn

State: TypeAlias = Tensor | tuple[Tensor, ...]

_JACOBIAN, _TRUNCATED = Feedback("jacobian"), Feedback("ft-bptt")


class Recurrent(FeedbackLayer):
    """Recurrent layer that runs any cell module over time with a feedback rule.

    ``s[t] = cell(x[t], s[t-1])``; backward ``delta[t] = e[t] + D[t+1] * delta[t+1]`` over the concatenated states, then
    one batched VJP of the cell over all T*B rows gives all other gradients (arXiv 2503.23104).

    Args:
        cell: a module with the call ``state' = cell(x, state)``; x is (rows, I), the state a tensor (rows, S) or a
            tuple of such tensors. Rows must be independent and the cell must not draw random numbers, because the
            backward pass calls it again on all T*B rows. Only ``cell.parameters()``, x and the initial state receive
            gradients. A cell with the two methods ``project_input(x)`` and ``step(inputs, state)``, where
            ``cell(x, state) = cell.step(cell.project_input(x), state)``, is called through them: ``project_input`` once
            on all T*B rows of x, returning one tensor (T*B, .), and ``step`` at every step. So are torch's RNNCell,
            GRUCell and LSTMCell. A cell with forward hooks is called as a whole.
        feedback: the rule, in any spelling of ``Feedback`` except ``"gate"``. A tensor diagonal has one value per
            element of the concatenated states, S in total. ``"jacobian"`` and ``"calibrated"`` estimate diag(J) as
            v * (J^T v) with one random sign vector v per row (Hutchinson's estimator, unbiased; its variance comes from
            the off-diagonal entries). ``"calibrated"`` averages it over all rows and steps. An exact pass of
            ``"fitted"`` calls the cell once more at every step.
        state_size: width of the state, or of each of its tensors; if None, the cell's ``hidden_size``, for an
            nn.LSTMCell as the width of both h and c.
        batch_first: inputs and outputs are (B, T, .) instead of (T, B, .).
        diagonal_jacobian: promise that ds[t]/ds[t-1] is a diagonal matrix, as of an IndRNN or a minGRU: no element of
            the concatenated states depends on another one. Then ``"bptt"`` is one scan with diag(J), and an estimate of
            diag(J) is exact. If None, the cell's attribute ``diagonal_jacobian``, False without one. ``check`` detects
            a wrong promise; a call does not.
        compile_step: run the step under ``torch.compile``, as one graph; a dictionary has the arguments of
            ``torch.compile``. The step is compiled at its first call, and again for a new dtype or device and for a
            second batch size, never for another T. The batched call of the backward pass is not compiled.

    Gradient: that of the rule; exact under ``"bptt"`` (the default), ``"torch"`` and with k >= T corrections. Without
        corrections a diagonal has no path from one tensor of the state to another: the loss, which is a function of the
        first, gives the others no gradient except through the final state, where ``statefeed.LSTM`` adds the path from
        h to c.

    Raises:
        ValueError: an unknown rule, ``"gate"``, or a cell with unknown state width; in a call, a cell that returns a
            state of another width.
        TypeError: a cell that is not a module; in a call, an input that is not a tensor.
        torch._dynamo.exc.TorchDynamoException: in a call, a step that ``torch.compile`` cannot compile as one graph.

    Warns:
        UserWarning: an approximate rule without corrections on a state of several tensors; once per layer.

    Cost: forward, T calls of the cell without autograd; backward, one call over T*B rows and one VJP, plus one VJP per
        correction and one for an estimate of diag(J). On a CPU, without corrections and learned rules, both run in
        blocks of steps with about a million elements of the state, which bounds the memory of the backward pass. Under
        ``"bptt"`` autograd through the loop, except for a diagonal Jacobian.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = Recurrent(nn.GRUCell(3, 4), feedback="calibrated+1")
        >>> y, h = layer(torch.zeros(7, 2, 3))
        >>> tuple(y.shape), tuple(h.shape)
        ((7, 2, 4), (2, 4))
    """

    # Defaults of the class, which old pickles have.
    diagonal_jacobian: bool = False
    compile_step: bool | dict[str, Any] = False
    _compiled: tuple[StepFunction, StepFunction] | None = None
    _warned = False  # that the output passes no gradient to other parts of the state

    def __init__(
        self,
        cell: nn.Module,
        feedback: FeedbackLike = "bptt",
        *,
        state_size: int | Sequence[int] | None = None,
        batch_first: bool = False,
        diagonal_jacobian: bool | None = None,
        compile_step: bool | Mapping[str, Any] = False,
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
        self.cell = cell
        self.batch_first = batch_first
        self.compile_step = dict(compile_step) if isinstance(compile_step, Mapping) else bool(compile_step)
        promised = getattr(cell, "diagonal_jacobian", False) if diagonal_jacobian is None else diagonal_jacobian
        self.diagonal_jacobian = bool(promised)
        if state_size is None:
            width = getattr(cell, "hidden_size", None)
            if not isinstance(width, int):
                raise ValueError(
                    f"state_size must be given, because {type(cell).__name__} has no integer attribute hidden_size"
                )
            state_size = (width, width) if isinstance(cell, nn.LSTMCell) else width
        self.state_size = state_size if isinstance(state_size, int) else tuple(state_size)
        self.feedback = feedback

    def _rule_changed(self) -> None:
        rule = self._feedback
        if len(self._widths) < 2 or rule.exact or rule.corrections or rule == _TRUNCATED:
            return
        if self._warned or self.diagonal_jacobian:
            return
        self._warned = True
        warn(
            f'feedback "{rule}" passes no gradient from the output of {type(self.cell).__name__} to the other parts of '
            "its state, because a diagonal has no path between parts: use statefeed.LSTM or statefeed.SLSTM for these "
            'cells, or corrections, as in "calibrated+1" or "jacobian+1"'
        )

    @property
    def feedback_cell(self) -> None:
        return None

    @property
    def _state_size(self) -> int:
        return sum(self._widths)

    @property
    def _widths(self) -> tuple[int, ...]:
        return (self.state_size,) if isinstance(self.state_size, int) else self.state_size

    def extra_repr(self) -> str:
        options = [
            f"{n}={getattr(self, n)}" for n in ("diagonal_jacobian", "compile_step") if getattr(self, n) is not False
        ]
        common = f"{self.feedback_repr()}, state_size={self.state_size}, batch_first={self.batch_first}"
        return ", ".join([common, *options])

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run the cell over time.

        Args:
            x: (T, B, I), or (B, T, I) with batch_first.
            state: the initial state in the form of the cell, a tensor (B, S) or a tuple of them; zeros if None.

        Returns:
            The first tensor of every state, (T, B, S) or (B, T, S), and the final state in the form of the cell.

        Gradient: that of the rule; plain autograd through the loop under ``"torch"``, and under ``"bptt"`` except for a
        diagonal Jacobian.
        """
        if isinstance(x, fx.Proxy):
            return traced(x, self, Recurrent, state)
        x, initial = self._time_first(x, state)
        if self.compile_step is not False and torch.compiler.is_compiling():
            # Outside the graph of an outer torch.compile, which would unroll the loop.
            y, final = torch.compiler.disable(self._run)(x, initial)  # type: ignore[no-untyped-call]
        else:
            y, final = self._run(x, initial)
        return (y.transpose(0, 1) if self.batch_first else y), (final[0] if len(final) == 1 else final)

    def check(self, x: Tensor, state: State | None = None) -> None:
        """Check on an example what the layer assumes of its cell.

        The rows of the cell are independent, it returns the same state twice, ``step(project_input(x), state)`` is
        ``forward(x, state)``, and the Jacobian is diagonal where ``diagonal_jacobian`` promises it. The states are
        those that the layer reaches on x.

        Args:
            x: as in a call; best in float64, with random parameters.
            state: as in a call.

        Raises:
            ValueError: what the cell does instead.

        Cost: a forward pass, a few calls of the cell over T*B rows, and five VJPs of it for a diagonal Jacobian.
        """
        check_cell(self._steps(), *self._time_first(x, state), self.diagonal_jacobian)

    def _time_first(self, x: Tensor, state: State | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x as (T, B, I), and the initial state as a tuple."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x must be a tensor of shape (T, B, I), or (B, T, I) with batch_first, got {type(x).__name__}: "
                "statefeed.Recurrent takes padded sequences, as torch.nn.utils.rnn.pad_packed_sequence returns them"
            )
        if x.dim() != 3:
            raise ValueError(f"x must have the shape (T, B, I), or (B, T, I) with batch_first, got {tuple(x.shape)}")
        if self.batch_first:
            x = x.transpose(0, 1)
        if state is None:
            # For integer inputs (tokens) the state has the dtype of the parameters: an integer state has no gradient.
            # Read the dtype only: ExpandedWeights have no is_floating_point.
            inexact = (p.dtype for p in self.cell.parameters() if p.dtype.is_floating_point or p.dtype.is_complex)
            real = x.is_floating_point() or x.is_complex()
            dtype = x.dtype if real else next(inexact, torch.get_default_dtype())
            initial = tuple(x.new_zeros(x.shape[1], width, dtype=dtype) for width in self._widths)
        else:
            initial = (state,) if isinstance(state, Tensor) else tuple(state)
        shapes = [tuple(s.shape) for s in initial]
        expected = [(x.shape[1], width) for width in self._widths]
        if shapes != expected:
            raise ValueError(f"state must have the shapes {expected}, given by state_size, got {shapes}")
        if not len(x):
            raise ValueError("x must have at least one step, got a sequence of length 0")
        return x, initial

    def _run(self, x: Tensor, initial: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The first tensor of every state, and the final state."""
        steps = self._steps()
        named = dict(self.cell.named_parameters())
        if not torch.is_grad_enabled() or (
            self._feedback.exact and not self._scans_exactly((x, *initial, *named.values()))
        ):
            states = steps.loop(steps.inputs(x), initial)
            return states[0], tuple(s[-1] for s in states)
        for tensor in (x, *initial, *named.values()):
            if is_expanded(tensor):
                raise RuntimeError(NO_EXPANDED_STEP)
            if tensor.is_complex():
                raise ValueError(complex_reason(self._feedback, tensor.dtype))
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(NO_TRANSFORM_OF_A_STEP)
        exact = self._feedback.exact
        call = Call(
            steps=steps,
            feedback=_JACOBIAN if exact else self._rules[0],
            learned=self.learned_state(0, x.device),
            diagonal_jacobian=self.diagonal_jacobian,
            # A prefix sum multiplies the factors of many steps first: where units explode and others saturate it has
            # infinity times zero, and BPTT has not.
            scan_method="sequential" if exact else "auto",
            names=tuple(named),
            parts=len(initial),
            compute_dtype=autocast_dtype(x),
        )
        function = Custom if torch.compiler.is_compiling() else EagerCustom
        y, *final = function.apply(call, steps.inputs(x), *initial, *named.values())  # type: ignore[no-untyped-call]
        return y, tuple(final)

    def _scans_exactly(self, tensors: Sequence[Tensor]) -> bool:
        """Whether an exact gradient is one scan with diag(J): not under torch's transforms, nor for complex numbers."""
        if not self.diagonal_jacobian or self._feedback.through_torch or is_transformed():
            return False
        return not any(is_expanded(t) or t.is_complex() for t in tensors)

    def _steps(self) -> Steps:
        return steps_of(self.cell, None if self.compile_step is False else self._compile)

    def _compile(self, function: StepFunction) -> StepFunction:
        """The compiled form of a step, compiled at its first call only."""
        if self._compiled is None or self._compiled[0] is not function:
            options = self.compile_step if isinstance(self.compile_step, dict) else {}
            self._compiled = (function, compile_step(function, options))
        return self._compiled[1]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_compiled", None)  # a compiled function cannot be copied or pickled
        return state
