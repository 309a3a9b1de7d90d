"""Recurrent layer for any user-defined cell, state' = cell(x, state), with a feedback rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from statefeed.feedback import (
    Context,
    Feedback,
    FeedbackLike,
    KernelRule,
    Learned,
    LearnedState,
    Linearization,
    as_feedback,
)
from statefeed.layout import shift_left
from statefeed.mixin import FeedbackLayer, complex_reason
from statefeed.recurrence import autocast_dtype
from statefeed.scan import diagonal_scan
from statefeed.transforms import (
    NO_EXPANDED_STEP,
    NO_SECOND_DERIVATIVE,
    NO_TRANSFORM_OF_A_STEP,
    is_batched,
    is_expanded,
    no_batched_gradients,
    no_forward_mode,
    traced,
)

State: TypeAlias = Tensor | tuple[Tensor, ...]


class Recurrent(FeedbackLayer):
    """Recurrent layer that runs any cell module over time with a feedback rule.

    ``s[t] = cell(x[t], s[t-1])``; backward ``delta[t] = e[t] + D[t+1] * delta[t+1]`` over the concatenated states, then
    one batched VJP of the cell over all T*B rows gives all other gradients (arXiv 2503.23104).

    Args:
        cell: a module with the call ``state' = cell(x, state)``; x is (rows, I), the state a tensor (rows, S) or a
            tuple of such tensors. Rows must be independent and the cell must not draw random numbers, because the
            backward pass calls it again on all T*B rows. Only ``cell.parameters()``, x and the initial state receive
            gradients.
        feedback: the rule, in any spelling of ``Feedback`` except ``"gate"``. A tensor diagonal has one value per
            element of the concatenated states, S in total. ``"jacobian"`` and ``"calibrated"`` estimate diag(J) as
            v * (J^T v) with one random sign vector v per row (Hutchinson's estimator, unbiased; its variance comes from
            the off-diagonal entries). ``"calibrated"`` averages it over all rows and steps. An exact pass of
            ``"fitted"`` calls the cell once more at every step.
        state_size: width of the state, or of each of its tensors; if None, the cell's ``hidden_size``, for an
            nn.LSTMCell as the width of both h and c.
        batch_first: inputs and outputs are (B, T, .) instead of (T, B, .).

    Gradient: that of the rule; exact under ``"bptt"`` (the default), ``"torch"`` and with k >= T corrections.

    Raises:
        ValueError: an unknown rule, ``"gate"``, or a cell with unknown state width; in a call, a cell that returns a
            state of another width.
        TypeError: a cell that is not a module.

    Cost: forward, T calls of the cell without autograd; backward, one call over T*B rows and one VJP, plus one VJP per
        correction and one for an estimate of diag(J).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = Recurrent(nn.GRUCell(3, 4), feedback="calibrated+1")
        >>> y, h = layer(torch.zeros(7, 2, 3))
        >>> tuple(y.shape), tuple(h.shape)
        ((7, 2, 4), (2, 4))
    """

    def __init__(
        self,
        cell: nn.Module,
        feedback: FeedbackLike = "bptt",
        *,
        state_size: int | Sequence[int] | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
        self.cell = cell
        self.batch_first = batch_first
        if state_size is None:
            width = getattr(cell, "hidden_size", None)
            if not isinstance(width, int):
                raise ValueError(
                    f"state_size must be given, because {type(cell).__name__} has no integer attribute hidden_size"
                )
            state_size = (width, width) if isinstance(cell, nn.LSTMCell) else width
        self.state_size = state_size if isinstance(state_size, int) else tuple(state_size)
        # Converted here: nn.Module would register a Parameter under this name and bypass the property.
        self.feedback = as_feedback(feedback)

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
        return f"{self.feedback_repr()}, state_size={self.state_size}, batch_first={self.batch_first}"

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run the cell over time.

        Args:
            x: (T, B, I), or (B, T, I) with batch_first.
            state: the initial state in the form of the cell, a tensor (B, S) or a tuple of them; zeros if None.

        Returns:
            The first tensor of every state, (T, B, S) or (B, T, S), and the final state in the form of the cell.

        Gradient: that of the rule; plain autograd through the loop under ``"bptt"``.
        """
        if isinstance(x, fx.Proxy):
            return traced(x, self, Recurrent, state)
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

        if self._feedback.exact or not torch.is_grad_enabled():
            states = _loop(self.cell, x, initial)
            y, final = states[0], tuple(s[-1] for s in states)
        else:
            named = dict(self.cell.named_parameters())
            for tensor in (x, *initial, *named.values()):
                if is_expanded(tensor):
                    raise RuntimeError(NO_EXPANDED_STEP)
                if tensor.is_complex():
                    raise ValueError(complex_reason(self._feedback, tensor.dtype))
            if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
                raise RuntimeError(NO_TRANSFORM_OF_A_STEP)
            call = _Call(
                self.cell,
                self._rules[0],
                self.learned_state(0, x.device),
                tuple(named),
                len(initial),
                autocast_dtype(x),
            )
            function = _Custom if torch.compiler.is_compiling() else _EagerCustom
            y, *finals = function.apply(call, x, *initial, *named.values())  # type: ignore[no-untyped-call]
            final = tuple(finals)
        return (y.transpose(0, 1) if self.batch_first else y), (final[0] if len(final) == 1 else final)


def _loop(cell: nn.Module, x: Tensor, initial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All states, each (T, B, .)."""
    state, states = initial, []
    for step in x:
        state = _call(cell, {}, step, state)
        states.append(state)
    return tuple(torch.stack(s) for s in zip(*states, strict=True))


def _call(cell: nn.Module, parameters: dict[str, Tensor], x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    after = functional_call(cell, parameters, (x, state if len(state) > 1 else state[0]))
    states = (after,) if isinstance(after, Tensor) else after
    expected = [tuple(s.shape) for s in state]
    got = [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in states or ()]
    if got != expected:
        raise ValueError(
            f"{type(cell).__name__} must return only its next state, with the shapes {expected}, got "
            f"{got or type(after).__name__}"
        )
    return tuple(states)


class _Call(NamedTuple):
    """Non-tensor arguments that the forward pass passes to the backward pass."""

    cell: nn.Module
    feedback: Feedback
    learned: LearnedState | None
    names: tuple[str, ...]  # names of the parameters
    parts: int  # tensors of the state
    compute_dtype: torch.dtype | None

    def autocast(self, x: Tensor) -> torch.autocast:
        device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
        return torch.autocast(device, self.compute_dtype, self.compute_dtype is not None)


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states = _loop(call.cell, x, rest[: call.parts])
        ctx.call = call
        ctx.save_for_backward(x, *states, *rest)
        return states[0], *(s[-1].clone() for s in states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if any(is_batched(g) for g in grads):
            raise RuntimeError(no_batched_gradients(None))
        if torch.is_grad_enabled():  # in a backward pass only with create_graph=True
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        call: _Call = ctx.call
        x, *saved = ctx.saved_tensors
        parts = call.parts
        states, initial, parameters = saved[:parts], saved[parts : 2 * parts], saved[2 * parts :]
        T, B = x.shape[:2]
        widths = [s.shape[-1] for s in states]
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[2 + parts :]]

        before = [
            torch.cat([s0[None], s[:-1]]).flatten(0, 1).requires_grad_() for s, s0 in zip(states, initial, strict=True)
        ]
        leaves = [t.detach().requires_grad_(n) for t, n in zip((x.flatten(0, 1), *parameters), needs, strict=True)]
        with torch.enable_grad(), call.autocast(x):
            named = dict(zip(call.names, leaves[1:], strict=True))
            after = torch.cat(_call(call.cell, named, leaves[0], tuple(before)), -1)

        def vjp(delta: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
            """Gradients of ``inputs``; None for an input that the cell does not use."""
            rows = delta.flatten(0, 1).to(after.dtype)
            return torch.autograd.grad(after, inputs, rows, retain_graph=True, allow_unused=True)

        def jacobian_product(delta: Tensor) -> Tensor:
            """J^T delta, (T, B, S)."""
            grads = [torch.zeros_like(s) if g is None else g for g, s in zip(vjp(delta, before), before, strict=True)]
            return torch.cat(grads, -1).reshape(T, B, sum(widths))

        e = torch.cat([grads[0], *(torch.zeros_like(s) for s in states[1:])], -1)
        e[-1] += torch.cat(grads[1:], -1)
        diagonal, learned = call.feedback.diagonal, call.learned
        if isinstance(diagonal, Learned) and learned is not None and e.numel() and diagonal.wants_exact(learned):
            with call.autocast(x):
                delta, grad_prev = _exact(call.cell, x, before, e)
            diagonal.fit(learned, [delta], [grad_prev])
        else:
            D = _diagonal(call, e, jacobian_product)
            D_next = D if D.dim() == 1 else shift_left(D)
            residual = torch.zeros_like(e)
            delta = diagonal_scan(e, D_next, reverse=True)
            for _ in range(call.feedback.corrections):
                residual = jacobian_product(delta) - D * delta
                delta = diagonal_scan(e + shift_left(residual), D_next, reverse=True)
            grad_prev = D * delta + residual

        d_initial = torch.split(grad_prev[0], widths, -1)
        needed = [leaf for leaf, n in zip(leaves, needs, strict=True) if n]
        found = iter(vjp(delta, needed) if needed else ())
        d_x, *d_parameters = [next(found) if n else None for n in needs]
        d_x = None if d_x is None else d_x.reshape(x.shape)
        return None, d_x, *d_initial, *d_parameters


class _EagerCustom(_Custom):
    """``_Custom`` that raises in forward mode; separate, as torch.compile supports no function with a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(no_forward_mode(None))


def _diagonal(call: _Call, e: Tensor, jacobian_product: Callable[[Tensor], Tensor]) -> Tensor:
    """D, (S,) if stationary, else (T, B, S)."""

    def estimate() -> Tensor:
        signs = torch.randint_like(e, 2) * 2 - 1
        return signs * jacobian_product(signs)

    def linearize() -> Linearization:
        raise ValueError(
            f'feedback "{call.feedback}" needs the formulas of a cell, but Recurrent only has its step; use "jacobian"'
        )

    if call.learned is not None and not e.numel():
        return call.learned.diagonal.to(e.dtype)
    context = Context(
        size=e.shape[-1],
        dtype=e.dtype,
        device=e.device,
        mean_jacobian=lambda: estimate().flatten(0, 1).mean(0),
        linearize=linearize,
        learned=call.learned,
    )
    rule: KernelRule = call.feedback.resolve(context)
    if rule.name == "jacobian":
        return estimate()
    assert rule.diagonal is not None
    return rule.diagonal.to(e.dtype)


def _exact(cell: nn.Module, x: Tensor, before: list[Tensor], e: Tensor) -> tuple[Tensor, Tensor]:
    """Sequential BPTT: the exact gradient of every state and of the state before it, both (T, B, S)."""
    T, B = x.shape[:2]
    delta, grad_prev = torch.empty_like(e), torch.zeros_like(e)
    for t in reversed(range(T)):
        delta[t] = e[t] + (grad_prev[t + 1] if t + 1 < T else 0.0)
        state = tuple(s.detach()[t * B : (t + 1) * B].requires_grad_() for s in before)
        with torch.enable_grad():
            after = torch.cat(_call(cell, {}, x[t], state), -1)
        found = torch.autograd.grad(after, state, delta[t].to(after.dtype), materialize_grads=True)
        grad_prev[t] = torch.cat(found, -1)
    return delta, grad_prev
