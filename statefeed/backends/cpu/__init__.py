"""The CPU backend: fused C++ kernels, compiled at first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from statefeed import native
from statefeed.backends.cpu import layer
from statefeed.backends.protocol import (
    Backend,
    Description,
    Forward,
    Gradients,
    Problem,
    Upstream,
    backward_in_order,
    forward_in_order,
)
from statefeed.cells.protocol import Cell
from statefeed.feedback.protocol import KernelRule


def unsupported_reason(cell: Cell, tensors: Sequence[Tensor], exact: bool) -> str | None:
    x, *others = tensors
    dtypes = {t.dtype for t in others}
    # With one tensor on meta the dispatcher would run the fakes of the operators, which compute nothing.
    if any(t.device.type != "cpu" for t in tensors):
        return f"there is no fused kernel for {' and '.join(sorted({t.device.type for t in tensors}))}"
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return f"under autocast the fused kernels take bfloat16, got {torch.get_autocast_dtype('cpu')}"
        if not {x.dtype, *dtypes} <= {torch.float32, torch.bfloat16} or others[-1].dtype != torch.float32:
            return f"under autocast the fused kernels take float32 weights, got {sorted(map(str, dtypes))}"
    elif x.dtype not in (torch.float32, torch.float64) or dtypes != {x.dtype}:
        return f"the fused kernels take float32 or float64 throughout, got {sorted(map(str, {x.dtype, *dtypes}))}"
    reason: str | None = native.unavailable("cpu")
    sizes = cell.gates, cell.shared_gates, len(cell.states), len(cell.constant_states), cell.saved_values
    return reason or _cell_reason(cell.name, *sizes)


def _cell_reason(name: str, *sizes: int) -> str | None:
    """Why the kernels do not support a cell; raises if its sizes differ from those of its kernel."""
    found = _cell_sizes(name)
    if not found:
        return f"the fused kernels have no cell {name!r}"
    if found != sizes:
        raise RuntimeError(
            f"the cell {name!r} has (gates, shared gates, states, constant states, saved values) = {sizes}, but its "
            f"CPU kernel has {found}: change one to match the other"
        )
    return None


@functools.cache
def _cell_sizes(name: str) -> tuple[int, ...]:
    return tuple(torch.ops.statefeed.cell_sizes(name))


# As for ``native.unavailable``: a constant to torch.compile.
_cell_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _upcast(problem: Problem) -> Problem:
    """Input and state in the dtype of the weights: under autocast they may be bfloat16."""
    dtype = problem.weights[0].dtype
    if problem.x.dtype == dtype and all(s.dtype == dtype for s in problem.state):
        return problem
    return problem._replace(x=problem.x.to(dtype), state=tuple(s.to(dtype) for s in problem.state))


def forward(problems: Sequence[Problem], save: bool) -> list[Forward]:
    return forward_in_order(layer.forward, [_upcast(p) for p in problems], save)


def recompute(problem: Problem, done: Forward) -> Forward:
    """The forward pass has already saved all values."""
    return done


def mean_jacobian(problem: Problem, done: Forward) -> Tensor:
    if problem.reverse:
        done = done._replace(y=problem.layout.reverse(done.y))
    return layer.mean_jacobian(_upcast(problem), done)


def backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    return backward_in_order(layer.backward, _upcast(problem), done, upstream, rule, needs_x)


def describe(cell: Cell, x: Tensor, exact: bool) -> Description:
    kernels = f"fused kernels ({native.described()})"
    why = f"all tensors are {x.dtype} on the cpu"
    if torch.is_autocast_enabled("cpu"):
        why += ", products in bfloat16 under autocast"
    return Description(kernels, kernels, why, saves_gates=True, recomputes_jacobian=True)


BACKEND = Backend(
    "cpu",
    unsupported_reason,
    forward,
    recompute,
    mean_jacobian,
    backward,
    device="cpu",
    describe=describe,
    upcasts=True,
    saves=True,
    fused_forward=True,
)
