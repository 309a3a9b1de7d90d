"""The CUDA backend: torch's own forward pass through cuDNN, and a fused backward pass in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statefeed import native
from statefeed.backends import reference
from statefeed.backends.protocol import (
    Backend,
    Forward,
    Gradients,
    Problem,
    Upstream,
    backward_in_order,
    in_order,
)
from statefeed.cells.protocol import Cell
from statefeed.feedback.protocol import KernelRule

_CELLS = ("gru", "lstm", "rnn_tanh", "rnn_relu")


def unsupported_reason(cell: Cell, tensors: Sequence[Tensor], exact: bool) -> str | None:
    if tensors[0].device.type != "cuda":
        return f"the Triton kernels take CUDA tensors, got {tensors[0].device.type}"
    if cell.name not in _CELLS:
        return f"the Triton kernels have no cell {cell.name!r}"
    if exact:
        return "on a GPU exact BPTT is torch's own, through cuDNN"
    reason: str | None = native.unavailable("cuda")
    return reason


def recompute(problem: Problem, done: Forward) -> Forward:
    from statefeed.backends.triton import layer

    order = in_order(problem)
    y = problem.layout.reverse(done.y) if problem.reverse else done.y
    with torch.autocast("cuda", enabled=False):
        tape = layer.tape(order.cell.name, order.x, y, order.state, list(order.weights), order.layout.batch_sizes)
    return done._replace(saved=(tape.gates, tape.extra, tape.before, tape.offsets))


def _tape(problem: Problem, done: Forward) -> Any:
    from statefeed.backends.triton import layer

    gates, extra, before, offsets = done.saved
    return layer.Tape(gates, extra, before, offsets, problem.layout.T, problem.layout.B)


def mean_jacobian(problem: Problem, done: Forward) -> Tensor:
    from statefeed.backends.triton import layer

    y = problem.layout.reverse(done.y) if problem.reverse else done.y
    return layer.mean_jacobian(problem.cell.name, _tape(problem, done), y, problem.weights[1])


def backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    return backward_in_order(_backward, problem, done, upstream, rule, needs_x)


def _backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    from statefeed.backends.triton import layer

    diagonal: Any = rule.diagonal if rule.name == "stationary" else {"direct": "gate"}.get(rule.name, rule.name)
    with torch.autocast("cuda", enabled=False):
        found = layer.backward(
            problem.cell.name, _tape(problem, done), problem.x, done.y, problem.state, list(problem.weights),
            (upstream.y, *upstream.final), diagonal, rule.corrections, needs_x,
        )  # fmt: skip
    return Gradients(found.x, found.state, tuple(found.weights))


BACKEND = Backend("triton", unsupported_reason, reference.forward, recompute, mean_jacobian, backward)
