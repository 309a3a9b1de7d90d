"""The CPU backend: fused C++ kernels, compiled at first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statefeed import native
from statefeed.backends.cpu import layer
from statefeed.backends.protocol import (
    Backend,
    Forward,
    Gradients,
    Problem,
    Upstream,
    backward_in_order,
    forward_in_order,
)
from statefeed.cells.protocol import Cell
from statefeed.feedback.protocol import KernelRule

_CELLS = ("gru", "lstm", "rnn_tanh", "rnn_relu")


def unsupported_reason(cell: Cell, tensors: Sequence[Tensor], exact: bool) -> str | None:
    x, *others = tensors
    dtypes = {t.dtype for t in others}
    if x.device.type != "cpu":
        return f"there is no fused kernel for {x.device.type}"
    if cell.name not in _CELLS:
        return f"the fused kernels have no cell {cell.name!r}"
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return f"under autocast the fused kernels take bfloat16, got {torch.get_autocast_dtype('cpu')}"
        if not {x.dtype, *dtypes} <= {torch.float32, torch.bfloat16} or others[-1].dtype != torch.float32:
            return f"under autocast the fused kernels take float32 weights, got {sorted(map(str, dtypes))}"
    elif x.dtype not in (torch.float32, torch.float64) or dtypes != {x.dtype}:
        return f"the fused kernels take float32 or float64 throughout, got {sorted(map(str, {x.dtype, *dtypes}))}"
    reason: str | None = native.unavailable("cpu")
    return reason


def _upcast(problem: Problem) -> Problem:
    """Input and state in the dtype of the weights: under autocast they may be bfloat16."""
    dtype = problem.weights[0].dtype
    return problem._replace(x=problem.x.to(dtype), state=tuple(s.to(dtype) for s in problem.state))


def forward(problems: Sequence[Problem], save: bool) -> list[Forward]:
    return forward_in_order(_forward, problems, save)


def _forward(problem: Problem, save: bool) -> Forward:
    problem = _upcast(problem)
    bf16 = problem.compute_dtype is not None
    y, final, saved = layer.forward(
        problem.cell.name, problem.x, problem.state, list(problem.weights), problem.layout.batch_sizes, save, bf16
    )
    return Forward(y, final, tuple(part for part in saved if part is not None))


def recompute(problem: Problem, done: Forward) -> Forward:
    return done


def _tape(done: Forward) -> layer.Tape:
    return layer.Tape(*done.saved) if done.saved else layer.Tape(None, None)


def mean_jacobian(problem: Problem, done: Forward) -> Tensor:
    if problem.reverse:
        done = done._replace(y=problem.layout.reverse(done.y))
    state = _upcast(problem).state
    return layer.mean_jacobian(
        problem.cell.name, _tape(done), done.y, state, problem.weights[1], problem.layout.batch_sizes
    )


def backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    return backward_in_order(_backward, problem, done, upstream, rule, needs_x)


_RULES = {"direct": "gate", "jacobian": "jacobian", "exact": "bptt"}


def _backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    problem = _upcast(problem)
    grads = tuple(g.to(done.y.dtype) for g in (upstream.y, *upstream.final))
    diagonal: Any = rule.diagonal if rule.name == "stationary" else _RULES[rule.name]
    found = layer.backward(
        problem.cell.name, _tape(done), problem.x, done.y, problem.state, list(problem.weights), grads, diagonal,
        rule.corrections, problem.layout.batch_sizes, needs_x, problem.compute_dtype is not None,
    )  # fmt: skip
    return Gradients(found.x, found.state, tuple(found.weights))


BACKEND = Backend("cpu", unsupported_reason, forward, recompute, mean_jacobian, backward, upcasts=True)
