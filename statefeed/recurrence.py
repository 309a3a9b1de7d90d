"""One recurrent layer with all its directions: one autograd function around a backend.

    forward     the backend's forward pass; what its backward pass needs is saved
    backward    per direction: the rule's diagonal, then the backend's backward pass

The chosen backend is an argument; nothing here asks which cell, rule or backend it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed.backends import BACKENDS, Forward, Gradients, Problem, Upstream, reference
from statefeed.cells.protocol import Cell, State
from statefeed.feedback.protocol import EXACT, Context, KernelRule, Learned, LearnedState, Linearization
from statefeed.feedback.value import Feedback
from statefeed.layout import Layout
from statefeed.transforms import (
    NO_SECOND_DERIVATIVE,
    is_batched,
    is_transformed,
    no_batched_gradients,
    no_forward_mode,
    no_vmap,
)


class Direction(NamedTuple):
    """One direction of a layer: initial state (B, width) per part, weights, rule, and what a learned rule stores."""

    state: State
    weights: tuple[Tensor, ...]
    rule: Feedback
    learned: LearnedState | None = None


class _Call(NamedTuple):
    """Everything besides tensors that a forward pass hands to its backward pass."""

    cell: Cell
    layout: Layout
    backend: str
    rules: tuple[Feedback, ...]
    learned: tuple[LearnedState | None, ...]
    directions: int
    parts: int  # of the state
    weights: int  # of one direction
    compute_dtype: torch.dtype | None
    output_dtype: torch.dtype | None  # of y and the final states, None for the backend's

    def problems(self, x: Tensor, tensors: Sequence[Tensor]) -> list[Problem]:
        """One per direction, from x as the layer takes it and states and weights, direction by direction."""
        rows = x.reshape(-1, x.shape[-1])
        each = self.parts + self.weights
        return [
            Problem(
                self.cell,
                rows,
                tuple(tensors[k * each : k * each + self.parts]),
                tuple(tensors[k * each + self.parts : (k + 1) * each]),
                self.layout,
                k == 1,
                self.compute_dtype,
            )
            for k in range(self.directions)
        ]

    @property
    def saves_y(self) -> bool:
        """Whether the backend's y is saved per direction because the layer's output is another tensor."""
        return self.directions > 1 or self.output_dtype is not None


def recurrence(
    cell: Cell, backend: str, x: Tensor, layout: Layout, directions: Sequence[Direction]
) -> tuple[Tensor, list[State]]:
    """Outputs and final states of one layer.

    Args:
        cell: of the layer.
        backend: key of the table of backends, one that supports the layer.
        x: (T, B, I), or packed rows (N, I).
        layout: how the rows of x lie in time.
        directions: one, or the forward and the reverse one.

    Returns:
        y, the shape of x with H in place of I, 2H with two directions; the final state of every direction.

    Gradient: approximate, as the rules say; exact for exact rules and k >= T corrections.

    Raises:
        RuntimeError: no steps, as torch raises.

    Cost: five products over all rows forward and backward, six under the exact rule, one more per correction; two more
        where the backend recomputes the gates.
    """
    if not layout.T:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    compute_dtype = autocast_dtype(x)
    output_dtype, packed = None, layout.batch_sizes is not None
    if compute_dtype is not None and BACKENDS[backend].upcasts:
        dtype = cell.autocast_dtype(compute_dtype, directions[0].state[-1].dtype, packed)
        output_dtype = None if dtype == directions[0].weights[0].dtype else dtype
    call = _Call(
        cell=cell,
        layout=layout,
        backend=backend,
        rules=tuple(d.rule for d in directions),
        learned=tuple(d.learned for d in directions),
        directions=len(directions),
        parts=len(cell.states),
        weights=len(directions[0].weights),
        compute_dtype=compute_dtype,
        output_dtype=output_dtype,
    )
    tensors = [t for d in directions for t in (*d.state, *d.weights)]
    if _needs_autograd((x, *tensors)):
        y, *rest = _autograd_function().apply(call, x, *tensors)  # type: ignore[no-untyped-call]
    else:
        y, *rest = _outputs(call, BACKENDS[backend].forward(call.problems(x, tensors), False))
    finals = [tuple(rest[k * call.parts : (k + 1) * call.parts]) for k in range(call.directions)]
    return y.reshape(*x.shape[:-1], y.shape[-1]), finals


def _needs_autograd(tensors: Sequence[Tensor]) -> bool:
    """Whether a backward pass may come, or a transform has to be answered."""
    if not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or any(t.requires_grad for t in tensors) or is_transformed()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of products under the autocast in force, None without; a device may have no autocast, as meta."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _outputs(call: _Call, done: Sequence[Forward]) -> list[Tensor]:
    """y and the final states, as the layer returns them."""
    y = done[0].y if len(done) == 1 else torch.cat([d.y for d in done], -1)
    outputs = [y, *(s for d in done for s in d.final)]
    return outputs if call.output_dtype is None else [t.to(call.output_dtype) for t in outputs]


class _Layer(torch.autograd.Function):
    """In torch.func's form: what the backward pass needs of the forward pass is an output of it, without a gradient.

    Outputs are y, the final states, and per direction what the backend saved, its y before it if ``saves_y``.
    """

    @staticmethod
    def forward(call: _Call, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        done = BACKENDS[call.backend].forward(call.problems(x, tensors), True)
        saved = (t for d in done for t in ((d.y, *d.saved) if call.saves_y else d.saved))
        return *_outputs(call, done), *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, x, *tensors = inputs
        saved = output[1 + call.directions * call.parts :]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(x, output[0], *tensors, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, y, *rest = ctx.saved_tensors
        each = call.parts + call.weights
        states = [s for k in range(call.directions) for s in rest[k * each : k * each + call.parts]]
        known = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, (y, *states), strict=False)]
        # With autograd off nobody can ask for a second derivative; torch.compile takes none, and traces no function
        # within a backward pass.
        compiling = torch.compiler.is_compiling()
        if not compiling and any(is_batched(g) for g in grads):
            raise RuntimeError(no_batched_gradients(call.cell))
        plain = not torch.is_grad_enabled() or compiling
        run = _gradients if plain else _Gradients.apply
        return None, *run(call, ctx.needs_input_grad[1], x, y, *known, *rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *_: Any) -> None:
        raise RuntimeError(no_vmap(call.cell))


class _TransformedLayer(_Layer):
    """``_Layer`` under torch.func; torch.compile takes no function with a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(no_forward_mode(ctx.call.cell))


class _EagerLayer(torch.autograd.Function):
    """``_Layer`` without torch.func, for which torch does 30 microseconds of Python at every call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _Layer.forward(*inputs)
        _Layer.setup_context(ctx, inputs, output)
        return output

    backward = _Layer.backward
    jvp = _TransformedLayer.jvp


def _autograd_function() -> type[torch.autograd.Function]:
    if torch.compiler.is_compiling():
        return _Layer
    return _TransformedLayer if torch._C._are_functorch_transforms_active() else _EagerLayer


class _Gradients(torch.autograd.Function):
    """``_gradients`` as a function of its own, so that a second derivative raises and torch.func.grad does not.

    ``once_differentiable`` cannot do it: it returns a detached result where the incoming gradient is a constant, and
    the second derivative would silently be zero.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *_: Any) -> None:  # as torch.func.jacrev asks for
        raise RuntimeError(no_batched_gradients(call.cell))


# torch asks for a signature at every call, and finding it costs more than a small layer's kernel.
for _function in (_Layer.forward, _Gradients.forward):
    setattr(_function, "__signature__", inspect.signature(_function))  # noqa: B010


def _gradients(call: _Call, needs_x: bool, x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, then of states and weights per direction.

    ``tensors`` are the gradients of y and of the final states, then states and weights, then what was saved.
    """
    count = call.directions * call.parts
    grad_y, finals, rest = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
    inputs = call.directions * (call.parts + call.weights)
    saved = rest[inputs:]
    rows, grad_rows = y.reshape(-1, y.shape[-1]), grad_y.reshape(-1, y.shape[-1])
    found: list[Gradients] = []
    for k, problem in enumerate(call.problems(x, rest[:inputs])):
        own = saved[k * len(saved) // call.directions : (k + 1) * len(saved) // call.directions]
        done = Forward(own[0], (), own[1:]) if call.saves_y else Forward(rows, (), own)
        width = grad_rows.shape[1] // call.directions
        upstream = Upstream(
            grad_rows if call.directions == 1 else grad_rows[:, k * width : (k + 1) * width],
            finals[k * call.parts : (k + 1) * call.parts],
        )
        found.append(_direction(call, k, problem, done, upstream, needs_x))
    d_x = None
    for gradients in found:
        if gradients.x is not None:
            # In the dtype of x, as autograd adds the gradients of two uses.
            d_x = gradients.x.to(x.dtype) if d_x is None else d_x + gradients.x.to(x.dtype)
    d_tensors = [g for gradients in found for g in (*gradients.state, *gradients.weights)]
    return None if d_x is None else d_x.view(x.shape), *d_tensors


def _direction(call: _Call, k: int, problem: Problem, done: Forward, upstream: Upstream, needs_x: bool) -> Gradients:
    """One direction under its rule."""
    rule, learned, backend = call.rules[k], call.learned[k], BACKENDS[call.backend]
    diagonal, any_rows = rule.diagonal, bool(done.y.numel())
    if isinstance(diagonal, Learned) and learned is not None:
        if not any_rows:
            return backend.backward(
                problem, backend.recompute(problem, done), upstream, KernelRule("stationary", learned.diagonal), needs_x
            )
        if diagonal.wants_exact(learned):
            done = reference.recompute(problem, done._replace(saved=()))
            exact = reference.state_gradients(problem, done, upstream, EXACT)
            diagonal.fit(learned, *exact)
            return reference.backward(problem, done, upstream, EXACT, needs_x)
    done = backend.recompute(problem, done)
    context = Context(
        size=sum(problem.sizes),
        dtype=torch.float64 if done.y.dtype == torch.float64 else torch.float32,
        device=done.y.device,
        mean_jacobian=lambda: backend.mean_jacobian(problem, done),
        linearize=lambda: Linearization(call.cell, reference.linearize(problem, done), problem.weights[1]),
        learned=learned,
    )
    return backend.backward(problem, done, upstream, rule.resolve(context), needs_x)
