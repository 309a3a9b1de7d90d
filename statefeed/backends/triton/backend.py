"""The CUDA backend: forward through cuDNN, all directions of a layer at once; backward in Triton kernels.

A cell that cuDNN lacks runs forward in the reference's loop; its gates are recomputed by the same products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statefeed import native
from statefeed.backends import reference
from statefeed.backends.protocol import (
    Backend,
    Description,
    Forward,
    Gradients,
    Problem,
    Upstream,
    Weights,
    forward_in_order,
    lacks_w_ih,
)
from statefeed.cells.protocol import Cell, projected_w_hh
from statefeed.feedback.protocol import KernelRule

# Triton is imported when a CUDA tensor is used, never with the package.


def unsupported_reason(cell: Cell, tensors: Sequence[Tensor], exact: bool) -> str | None:
    if tensors[0].device.type != "cuda":
        return f"the Triton kernels take CUDA tensors, got {tensors[0].device.type}"
    in_torch = cell.torch_forward is not None
    if exact:
        return (
            "on a GPU exact BPTT is torch's own, through cuDNN" if in_torch else "the Triton kernels have no exact BPTT"
        )
    if in_torch and lacks_w_ih(tensors):
        return "the Triton kernels need W_ih, got preactivations"
    reason: str | None = native.unavailable("cuda")
    return reason or _unsupported_cell(cell)


def _unsupported_cell(cell: Cell) -> str | None:
    from statefeed.backends.triton.cells import CELLS

    kernels = CELLS.get(cell.name)
    if kernels is None:
        return f"the Triton kernels have no cell {cell.name!r}; they have {', '.join(CELLS)}"
    sizes = (cell.gradient_parts, cell.gates, cell.shared_gates)
    if sizes != (kernels.states, kernels.gates, kernels.shared_gates):
        raise ValueError(
            f"the Triton kernels of cell {cell.name!r} have {kernels.states} states with a gradient, "
            f"{kernels.gates} gates and {kernels.shared_gates} shared gates, its Python cell has {sizes[0]}, "
            f"{sizes[1]} and {sizes[2]}"
        )
    return None


def forward(problems: Sequence[Problem], save: bool) -> list[Forward]:
    if problems[0].cell.torch_forward is None:
        return reference.forward(problems, save)
    if len(problems) == 1 and problems[0].reverse:
        return forward_in_order(lambda problem, save: _forward([problem], save)[0], problems, save)
    return _forward(problems, save)


def _forward(problems: Sequence[Problem], save: bool) -> list[Forward]:
    from statefeed.backends.triton import cudnn

    first, directions = problems[0], len(problems)
    layout, H = first.layout, first.state[0].shape[1]
    weights = cudnn.cast_weights([w for p in problems for w in p.weights], directions, first.compute_dtype)
    y, final = cudnn.layer(
        first.cell.torch_forward or first.cell.name,
        layout.grid(first.x) if layout.batch_sizes is None else first.x,
        layout.batch_sizes,
        [
            torch.stack(part) if directions > 1 else part[0][None]
            for part in zip(*(p.state for p in problems), strict=True)
        ],
        weights,
        directions,
        first.compute_dtype,
    )
    rows = y.flatten(0, -2) if y.dim() > 2 else y
    saved: list[tuple[Tensor, ...]] = [()] * directions
    if save and weights[0].dtype != first.weights[0].dtype:  # the backward pass needs them in the same dtype
        per = len(weights) // directions
        saved = [tuple(weights[k * per : (k + 1) * per]) for k in range(directions)]
    elif save:
        saved = [_precision_mark(y)] * directions
    return [
        Forward(rows[:, k * H : (k + 1) * H] if directions > 1 else rows, tuple(part[k] for part in final), saved[k])
        for k in range(directions)
    ]


def _precision_mark(y: Tensor) -> tuple[Tensor, ...]:
    """An empty tensor whose width encodes whether the forward pass ran in TF32, because only tensors can be saved.

    In a compiled graph nothing is saved, and the backward pass reads the setting when it runs.
    """
    if y.dtype != torch.float32 or torch.compiler.is_compiling():
        return ()
    from statefeed.backends.triton.precision import forward_precision

    return (y.new_empty((0, 1 if forward_precision() == "tf32" else 0)),)


def recompute(problem: Problem, done: Forward) -> Forward:
    from statefeed.backends.triton import operators as _operators  # noqa: F401

    if problem.cell.torch_forward is None:
        return _recompute_from_states(problem, done)
    offsets = problem.layout.offsets(problem.x.device)
    precision, weights = "", problem.weights
    if len(done.saved) == 1:
        precision = ("ieee", "tf32")[done.saved[0].shape[1]]
    elif done.saved:
        weights = done.saved
    saved = torch.ops.statefeed.triton_recompute(
        problem.cell.name, problem.x, done.y, problem.state, weights, offsets, problem.reverse, precision
    )
    return done._replace(saved=(*saved, offsets, precision, weights))


def _recompute_from_states(problem: Problem, done: Forward) -> Forward:
    """What the kernels read of a cell with ``from_states``, by the products of its loop and in their precision."""
    parts = problem.cell.gradient_parts
    previous, after, (inputs, hidden) = reference.states(problem, done)
    gates = inputs + hidden
    saved = torch.cat([*previous[1:], *after[parts:]], -1).to(gates.dtype)
    dtype = problem.weights[0].dtype
    if problem.compute_dtype is not None and dtype != torch.float64:  # autocast does not cast float64
        dtype = problem.compute_dtype
    weights = tuple(w.to(dtype) for w in problem.weights)
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    rows = previous[0].to(dtype), gates, saved
    return done._replace(saved=(*rows, problem.layout.offsets(problem.x.device), precision, weights))


def mean_jacobian(problem: Problem, done: Forward) -> Tensor:
    *saved, offsets, _, cast = done.saved
    weights = Weights.of(cast)
    w_hh = projected_w_hh(weights.w_hh, weights.w_hr)
    mean: Tensor = torch.ops.statefeed.triton_mean_jacobian(
        problem.cell.name, *saved, done.y, w_hh, problem.layout.B, offsets
    )
    return mean


def backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    *saved, offsets, precision, cast = done.saved
    named, cast_named = problem.named_weights, Weights.of(cast)
    # The gradients of biases are float32 sums.
    weights = [w for w in cast_named._replace(b_ih=named.b_ih, b_hh=named.b_hh) if w is not None]
    state = problem.state[: problem.cell.gradient_parts]
    grads: list[Any] = [upstream.y, *upstream.final]
    d_x, *rest = torch.ops.statefeed.triton_backward(
        problem.cell.name, rule.name, *saved, problem.x, done.y, state, weights, grads, rule.diagonal, offsets,
        rule.corrections, problem.reverse, needs_x, precision,
    )  # fmt: skip
    d_weights = tuple(g.to(w.dtype) for g, w in zip(rest[3:], named, strict=True) if w is not None)
    return Gradients(d_x if needs_x else None, tuple(rest[: len(state)]), d_weights)


def describe(cell: Cell, x: Tensor, exact: bool) -> Description:
    recomputes = cell.gates > 1
    backward = f"fused kernels ({native.described('cuda')}){', which recompute the gates' if recomputes else ''}"
    rnn = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    forward, setting, by = "torch's layer without autograd, through cuDNN", rnn, "cuDNN is"
    if cell.torch_forward is None:
        forward = "one step after the other, in PyTorch"
        setting, by = torch.backends.cuda.matmul.fp32_precision, "torch's products are"
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        products = f"products run in {torch.get_autocast_dtype(kind)}, under autocast"
    else:
        products = f"float32 products run in {'TF32' if setting == 'tf32' else 'float32'}, as {by} set"
    why = f"all tensors are {x.dtype} on the GPU; {products}"
    saves_states = cell.torch_forward is None
    return Description(forward, backward, why, saves_states=saves_states, recomputes_gates=recomputes)


BACKEND = Backend(
    "triton", unsupported_reason, forward, recompute, mean_jacobian, backward, device="cuda", describe=describe
)
