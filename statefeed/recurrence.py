"""One recurrent layer with all its directions, as one autograd function around a backend.

    forward     the backend's forward pass, which saves the tensors of its backward pass
    backward    per direction: the rule's diagonal, then the backend's backward pass

The backend is an argument; this module does not depend on the cell, the rule or the backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed import newton
from statefeed.backends import BACKENDS, Forward, Gradients, Problem, Upstream, reference
from statefeed.cells.protocol import Cell, State, projected_w_hh
from statefeed.feedback.protocol import EXACT, Context, KernelRule, Learned, LearnedState, Linearization
from statefeed.feedback.value import Feedback
from statefeed.layout import Layout
from statefeed.saved_tensors import saved_tensors
from statefeed.transforms import (
    NO_SECOND_DERIVATIVE,
    is_batched,
    is_transformed,
    no_batched_gradients,
    no_forward_mode,
    no_vmap,
)

NO_STEP = "Expected sequence length to be larger than 0 in RNN"  # torch's message


class Direction(NamedTuple):
    """One direction of a layer.

    Attributes:
        state: initial state, (B, width) per part.
        weights: in the order of ``Problem.weights``.
        rule: its feedback rule.
        learned: the tensors of a learned rule, None for other rules.
    """

    state: State
    weights: tuple[Tensor, ...]
    rule: Feedback
    learned: LearnedState | None = None


class _Call(NamedTuple):
    """Non-tensor arguments that the forward pass passes to the backward pass."""

    cell: Cell
    layout: Layout
    backend: str
    rules: tuple[Feedback, ...]
    learned: tuple[LearnedState | None, ...]
    directions: int
    parts: int  # number of tensors of the state
    weights: int  # number of weights of one direction
    compute_dtype: torch.dtype | None
    output_dtypes: tuple[torch.dtype, ...] | None  # of the parts of the state, y as h; None keeps the backend's
    iteration: newton.Run | None  # None for the backend's own forward pass

    def problems(self, x: Tensor, tensors: Sequence[Tensor]) -> list[Problem]:
        """One problem per direction; ``tensors`` are its states and weights, one direction after the other."""
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

    def constants(self, k: int, states: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parts without a gradient of direction k; ``states`` are those of one direction after the other."""
        return states[k * self.parts + self.cell.gradient_parts : (k + 1) * self.parts]

    def forward(self, x: Tensor, tensors: Sequence[Tensor], save: bool) -> list[Forward]:
        problems = self.problems(x, tensors)
        if self.iteration is not None:
            return newton.forward(problems, self.backend, self.iteration)
        return BACKENDS[self.backend].forward(problems, save)

    @property
    def saves_y(self) -> bool:
        """Whether the backend's y is saved per direction because the layer's output is another tensor."""
        return self.directions > 1 or self.output_dtypes is not None


def recurrence(
    cell: Cell,
    backend: str,
    x: Tensor,
    layout: Layout,
    directions: Sequence[Direction],
    iteration: newton.Run | None = None,
) -> tuple[Tensor, list[State]]:
    """Compute outputs and final states of one layer.

    Args:
        cell: the cell of the layer.
        backend: key of ``BACKENDS``; the backend must support the layer.
        x: (T, B, I), or packed rows (N, I).
        layout: positions of the rows of x in time.
        directions: the forward direction, or the forward and the reverse direction.
        iteration: settings and statistics of a forward pass that is parallel over time; None for the backend's own
            forward pass.

    Returns:
        y, in the shape of x with the width of h in place of I (twice it with two directions), and the final state of
        every direction.

    Gradient: approximate; exact under exact rules and with k >= T corrections.

    Raises:
        RuntimeError: x has no steps; torch raises the same error.

    Cost: five products over all rows forward and backward, six under the exact rule, one more per correction, and two
        more if the backend recomputes the gates.
    """
    if not layout.T:
        raise RuntimeError(NO_STEP)
    compute_dtype = autocast_dtype(x)
    output_dtypes = None
    if compute_dtype is not None and BACKENDS[backend].upcasts:
        dtypes = cell.autocast_dtypes(compute_dtype, directions[0].state[-1].dtype, layout.ragged)
        output_dtypes = None if set(dtypes) == {directions[0].weights[0].dtype} else dtypes
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
        output_dtypes=output_dtypes,
        iteration=iteration,
    )
    tensors = [t for d in directions for t in (*d.state, *d.weights)]
    if _needs_autograd((x, *tensors)):
        y, *rest = _autograd_function().apply(call, x, *tensors)  # type: ignore[no-untyped-call]
    else:
        y, *rest = _outputs(call, call.forward(x, tensors, False))
    finals = [tuple(rest[k * call.parts : (k + 1) * call.parts]) for k in range(call.directions)]
    return y.reshape(*x.shape[:-1], y.shape[-1]), finals


def _needs_autograd(tensors: Sequence[Tensor]) -> bool:
    """Whether a backward pass is possible, or a function transform is active."""
    if not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or any(t.requires_grad for t in tensors) or is_transformed()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of products under autocast; None if autocast is disabled or the device, such as meta, has none."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _outputs(call: _Call, done: Sequence[Forward]) -> list[Tensor]:
    """y and the final states, as the layer returns them."""
    y = done[0].y if len(done) == 1 else torch.cat([d.y for d in done], -1)
    outputs = [y, *(s for d in done for s in d.final)]
    if call.output_dtypes is None:
        return outputs
    dtypes = (call.output_dtypes[0], *call.output_dtypes * len(done))
    return [t.to(dtype) for t, dtype in zip(outputs, dtypes, strict=True)]


class _Layer(torch.autograd.Function):
    """Autograd function of a layer in the form of torch.func: saved tensors are non-differentiable outputs.

    Outputs are y, the final states, and for every direction the tensors that the backend saved, preceded by the
    direction's y if ``saves_y``.
    """

    @staticmethod
    def forward(call: _Call, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        done = call.forward(x, tensors, True)
        saved = (t for d in done for t in ((d.y, *d.saved) if call.saves_y else d.saved))
        return *_outputs(call, done), *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, x, *tensors = inputs
        saved = output[1 + call.directions * call.parts :]
        ctx.mark_non_differentiable(*saved, *(s for k in range(call.directions) for s in call.constants(k, output[1:])))
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(x, output[0], *tensors, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, y, *rest = saved_tensors(ctx)
        each = call.parts + call.weights
        states = [s for k in range(call.directions) for s in rest[k * each : k * each + call.parts]]
        output_grads = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, (y, *states), strict=False)]
        # Without autograd (no create_graph) there is no second derivative to guard against. torch.compile supports no
        # second derivative, and no autograd function inside a backward pass.
        compiling = torch.compiler.is_compiling()
        if not compiling and any(is_batched(g) for g in grads):
            raise RuntimeError(no_batched_gradients(call.cell))
        unguarded = not torch.is_grad_enabled() or compiling
        run = _gradients if unguarded else _Gradients.apply
        return None, *run(call, ctx.needs_input_grad[1], x, y, *output_grads, *rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *_: Any) -> None:
        raise RuntimeError(no_vmap(call.cell))


class _TransformedLayer(_Layer):
    """``_Layer`` for torch.func; separate because torch.compile does not support a function with a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(no_forward_mode(ctx.call.cell))


class _EagerLayer(torch.autograd.Function):
    """``_Layer`` without support of torch.func, which costs 30 microseconds of Python per call."""

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
    """The backward pass as an autograd function whose own backward raises.

    With ``create_graph=True`` autograd records the backward pass. Through this function a second derivative raises an
    error, while torch.func.grad, which also records the backward pass but never differentiates it, works.
    ``once_differentiable`` is not enough: if the incoming gradient does not require grad, it returns a detached result,
    and the second derivative is silently zero.
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
    def vmap(info: Any, in_dims: Any, call: _Call, *_: Any) -> None:  # called by torch.func.jacrev
        raise RuntimeError(no_batched_gradients(call.cell))


# torch inspects the signature at every call, which costs more than the kernel of a small layer.
for _function in (_Layer.forward, _Gradients.forward):
    setattr(_function, "__signature__", inspect.signature(_function))  # noqa: B010


def _gradients(call: _Call, needs_x: bool, x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of x, then the gradients of states and weights of every direction.

    ``tensors`` are the gradients of y and of the final states, then states and weights, then the saved tensors.
    """
    count = call.directions * call.parts
    grad_y, finals, rest = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
    inputs = call.directions * (call.parts + call.weights)
    saved = rest[inputs:]
    rows, grad_rows = y.reshape(-1, y.shape[-1]), grad_y.reshape(-1, y.shape[-1])
    found: list[Gradients] = []
    for k, problem in enumerate(call.problems(x, rest[:inputs])):
        part = saved[k * len(saved) // call.directions : (k + 1) * len(saved) // call.directions]
        done = Forward(part[0], (), part[1:]) if call.saves_y else Forward(rows, (), part)
        width = grad_rows.shape[1] // call.directions
        upstream = Upstream(
            grad_rows if call.directions == 1 else grad_rows[:, k * width : (k + 1) * width],
            finals[k * call.parts : k * call.parts + call.cell.gradient_parts],
        )
        found.append(_direction(call, k, problem, done, upstream, needs_x))
    d_x = None
    for gradients in found:
        if gradients.x is not None:
            # Add in the dtype of x, as autograd adds the gradients of two uses of a tensor.
            d_x = gradients.x.to(x.dtype) if d_x is None else d_x + gradients.x.to(x.dtype)
    d_tensors = []
    for gradients, problem in zip(found, call.problems(x, rest[:inputs]), strict=True):
        constants = (torch.zeros_like(s) for s in problem.state[call.cell.gradient_parts :])
        d_tensors += [*gradients.state, *constants, *gradients.weights]
    return None if d_x is None else d_x.view(x.shape), *d_tensors


def _direction(call: _Call, k: int, problem: Problem, done: Forward, upstream: Upstream, needs_x: bool) -> Gradients:
    """Gradients of one direction under its rule."""
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
            return reference.parameter_gradients(problem, done, upstream, exact, needs_x)
    done = backend.recompute(problem, done)
    context = Context(
        size=sum(problem.sizes),
        dtype=torch.float64 if done.y.dtype == torch.float64 else torch.float32,
        device=done.y.device,
        mean_jacobian=lambda: backend.mean_jacobian(problem, done),
        linearize=lambda: _linearization(problem, done),
        learned=learned,
    )
    return backend.backward(problem, done, upstream, rule.resolve(context), needs_x)


def _linearization(problem: Problem, done: Forward) -> Linearization:
    weights = problem.named_weights
    w_hh = projected_w_hh(weights.w_hh, weights.w_hr)
    at = reference.linearize(problem, done)
    return Linearization(problem.cell, at, w_hh, problem.sizes, problem.layout, problem.reverse)
