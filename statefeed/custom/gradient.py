"""Gradient of a feedback rule for a user's cell: a scan over time, and VJPs of the cell over the rows of many steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed.custom.block import Block, Saved, joined, ranges
from statefeed.custom.steps import Steps
from statefeed.feedback import Context, Feedback, KernelRule, Learned, LearnedState, Linearization
from statefeed.layout import shift_left
from statefeed.saved_tensors import saved_tensors
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

    def saved(self, inputs: Tensor, *rest: Tensor) -> Saved:
        """The saved tensors in their places: inputs, states, initial state, parameters."""
        device = inputs.device.type if torch.amp.is_autocast_available(inputs.device.type) else "cpu"
        return Saved(
            self.steps,
            inputs,
            rest[: self.parts],
            rest[self.parts : 2 * self.parts],
            dict(zip(self.names, rest[2 * self.parts :], strict=True)),
            torch.autocast(device, self.compute_dtype, self.compute_dtype is not None),
        )


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
        saved = call.saved(*saved_tensors(ctx))
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[2 + call.parts :]]
        # Corrections and learned rules need the products of all steps before the next scan or the first.
        whole = call.feedback.corrections > 0 or call.feedback.learned or torch.compiler.is_compiling()
        d_inputs: list[Tensor] = []
        d_parameters: list[Tensor | None] = [None] * len(saved.parameters)
        after: _Solved | None = None  # the block that follows in time
        for start, stop in ranges(saved, whole):
            block = Block(saved, start, stop, needs)
            e = joined([grads[0][start:stop], *(torch.zeros_like(s[start:stop]) for s in saved.states[1:])])
            if stop == len(saved.inputs):
                e = torch.cat([e[:-1], e[-1:] + joined(grads[1:])])
            solved = _fitted(call, saved, e) or _solve(call, block, e, after)
            found_inputs, *found = block.gradients(solved.delta)
            d_inputs += [] if found_inputs is None else [found_inputs]
            d_parameters = [_sum(total, more) for total, more in zip(d_parameters, found, strict=True)]
            after = solved
        assert after is not None
        d_initial = torch.split(after.grad_prev, [s.shape[-1] for s in saved.states], -1)
        d_all = None if not d_inputs else d_inputs[0] if len(d_inputs) == 1 else torch.cat(d_inputs[::-1])
        return None, d_all, *d_initial, *d_parameters


class EagerCustom(Custom):
    """``Custom`` that raises in forward mode; separate, as torch.compile supports no function with a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(no_forward_mode(None))


class _Solved(NamedTuple):
    """The gradients of the states of a block.

    Attributes:
        delta: of every state, (steps, B, S).
        grad_prev: of the state before the block, (B, S).
        factor: D of the first step, (S,) or (B, S).
    """

    delta: Tensor
    grad_prev: Tensor
    factor: Tensor


def _solve(call: Call, block: Block, e: Tensor, after: _Solved | None) -> _Solved:
    """The state gradients of a block under a rule; ``after`` is the block that follows in time."""
    D = _diagonal(call, block, e)
    D_next = D if D.dim() == 1 else shift_left(D) if after is None else torch.cat([D[1:], after.factor[None]])
    later = None if after is None else after.delta[0]
    delta = diagonal_scan(e, D_next, reverse=True, initial=later, method=call.scan_method)
    residual = torch.zeros_like(e[:1])
    for _ in range(call.feedback.corrections):
        residual = block.state_gradient(delta) - D * delta
        delta = diagonal_scan(e + shift_left(residual), D_next, reverse=True, method=call.scan_method)
    factor = D if D.dim() == 1 else D[0]
    return _Solved(delta, factor * delta[0] + residual[0], factor)


def _diagonal(call: Call, block: Block, e: Tensor) -> Tensor:
    """D, (S,) if stationary, else (steps, B, S)."""

    def estimate() -> Tensor:
        if call.diagonal_jacobian:  # exact for any signs, so for ones
            return block.state_gradient(torch.ones_like(e[:1, :1, :1]).expand_as(e))
        signs = torch.randint_like(e, 2) * 2 - 1
        return signs * block.state_gradient(signs)

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


def _fitted(call: Call, saved: Saved, e: Tensor) -> _Solved | None:
    """The exact state gradients, from which a learned rule fits its diagonal; None if it does not want them now."""
    diagonal, learned = call.feedback.diagonal, call.learned
    if not isinstance(diagonal, Learned) or learned is None or not e.numel() or not diagonal.wants_exact(learned):
        return None
    with saved.autocast:
        delta, grad_prev = _exact(saved, e)
    diagonal.fit(learned, [delta], [grad_prev])
    return _Solved(delta, grad_prev[0], learned.diagonal)


def _exact(saved: Saved, e: Tensor) -> tuple[Tensor, Tensor]:
    """Sequential BPTT: the exact gradient of every state and of the state before it, both (T, B, S)."""
    T = len(e)
    before = saved.before(0, T)
    delta, grad_prev = torch.empty_like(e), torch.zeros_like(e)
    for t in reversed(range(T)):
        delta[t] = e[t] + (grad_prev[t + 1] if t + 1 < T else 0.0)
        state = tuple(s[t].detach().requires_grad_() for s in before)
        with torch.enable_grad():
            after = joined(saved.steps.step(saved.inputs[t], state))
        found = torch.autograd.grad(after, state, delta[t].to(after.dtype), materialize_grads=True)
        grad_prev[t] = joined(found)
    return delta, grad_prev


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more
