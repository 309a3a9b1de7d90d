"""Gradient of a feedback rule for a user's cell: one batched VJP of the cell over all T*B rows, and a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed.custom.steps import Steps
from statefeed.feedback import Context, Feedback, KernelRule, Learned, LearnedState, Linearization
from statefeed.layout import shift_left
from statefeed.scan import diagonal_scan
from statefeed.transforms import NO_SECOND_DERIVATIVE, is_batched, no_batched_gradients, no_forward_mode


class Call(NamedTuple):
    """Non-tensor arguments that the forward pass passes to the backward pass."""

    steps: Steps
    feedback: Feedback
    learned: LearnedState | None
    diagonal_jacobian: bool
    scan_method: str
    names: tuple[str, ...]  # names of the parameters
    parts: int  # tensors of the state
    compute_dtype: torch.dtype | None

    def autocast(self, inputs: Tensor) -> torch.autocast:
        device = inputs.device.type if torch.amp.is_autocast_available(inputs.device.type) else "cpu"
        return torch.autocast(device, self.compute_dtype, self.compute_dtype is not None)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, inputs: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        # Detached: a compiled step would be compiled once with and once without inputs that require a gradient.
        states = call.steps.loop(inputs.detach(), tuple(s.detach() for s in rest[: call.parts]))
        ctx.call = call
        ctx.save_for_backward(inputs, *states, *rest)
        return states[0], *(s[-1].clone() for s in states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if any(is_batched(g) for g in grads):
            raise RuntimeError(no_batched_gradients(None))
        if torch.is_grad_enabled():  # in a backward pass only with create_graph=True
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        call: Call = ctx.call
        inputs, *saved = ctx.saved_tensors
        parts = call.parts
        states, initial, parameters = saved[:parts], saved[parts : 2 * parts], saved[2 * parts :]
        T, B = inputs.shape[:2]
        widths = [s.shape[-1] for s in states]
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[2 + parts :]]

        before = [
            torch.cat([s0[None], s[:-1]]).flatten(0, 1).requires_grad_() for s, s0 in zip(states, initial, strict=True)
        ]
        leaves = [t.detach().requires_grad_(n) for t, n in zip((inputs.flatten(0, 1), *parameters), needs, strict=True)]
        with torch.enable_grad(), call.autocast(inputs):
            named = dict(zip(call.names, leaves[1:], strict=True))
            after = torch.cat(call.steps.step(leaves[0], tuple(before), named), -1)

        def vjp(delta: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
            """Gradients of some leaves; None for one that the cell does not use."""
            rows = delta.flatten(0, 1).to(after.dtype)
            return torch.autograd.grad(after, wanted, rows, retain_graph=True, allow_unused=True)

        def jacobian_product(delta: Tensor) -> Tensor:
            """J^T delta, (T, B, S)."""
            grads = [torch.zeros_like(s) if g is None else g for g, s in zip(vjp(delta, before), before, strict=True)]
            return torch.cat(grads, -1).reshape(T, B, sum(widths))

        e = torch.cat([grads[0], *(torch.zeros_like(s) for s in states[1:])], -1)
        e[-1] += torch.cat(grads[1:], -1)
        diagonal, learned = call.feedback.diagonal, call.learned
        if isinstance(diagonal, Learned) and learned is not None and e.numel() and diagonal.wants_exact(learned):
            with call.autocast(inputs):
                delta, grad_prev = _exact(call.steps, inputs, before, e)
            diagonal.fit(learned, [delta], [grad_prev])
        else:
            D = _diagonal(call, e, jacobian_product)
            D_next = D if D.dim() == 1 else shift_left(D)
            residual = torch.zeros_like(e)
            delta = diagonal_scan(e, D_next, reverse=True, method=call.scan_method)
            for _ in range(call.feedback.corrections):
                residual = jacobian_product(delta) - D * delta
                delta = diagonal_scan(e + shift_left(residual), D_next, reverse=True, method=call.scan_method)
            grad_prev = D * delta + residual

        d_initial = torch.split(grad_prev[0], widths, -1)
        needed = [leaf for leaf, n in zip(leaves, needs, strict=True) if n]
        found = iter(vjp(delta, needed) if needed else ())
        d_inputs, *d_parameters = [next(found) if n else None for n in needs]
        d_inputs = None if d_inputs is None else d_inputs.reshape(inputs.shape)
        return None, d_inputs, *d_initial, *d_parameters


class EagerCustom(Custom):
    """``Custom`` that raises in forward mode; separate, as torch.compile supports no function with a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(no_forward_mode(None))


def _diagonal(call: Call, e: Tensor, jacobian_product: Callable[[Tensor], Tensor]) -> Tensor:
    """D, (S,) if stationary, else (T, B, S)."""

    def estimate() -> Tensor:
        # Of a diagonal Jacobian any signs give the exact diagonal: no random numbers are needed.
        signs = torch.ones_like(e) if call.diagonal_jacobian else torch.randint_like(e, 2) * 2 - 1
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


def _exact(steps: Steps, inputs: Tensor, before: list[Tensor], e: Tensor) -> tuple[Tensor, Tensor]:
    """Sequential BPTT: the exact gradient of every state and of the state before it, both (T, B, S)."""
    T, B = inputs.shape[:2]
    delta, grad_prev = torch.empty_like(e), torch.zeros_like(e)
    for t in reversed(range(T)):
        delta[t] = e[t] + (grad_prev[t + 1] if t + 1 < T else 0.0)
        state = tuple(s.detach()[t * B : (t + 1) * B].requires_grad_() for s in before)
        with torch.enable_grad():
            after = torch.cat(steps.step(inputs[t], state), -1)
        found = torch.autograd.grad(after, state, delta[t].to(after.dtype), materialize_grads=True)
        grad_prev[t] = torch.cat(found, -1)
    return delta, grad_prev
