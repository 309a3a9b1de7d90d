"""Reference backend: torch's own forward pass, and a backward pass of scans and large products in PyTorch.

    delta[t] = e[t] + D[t+1] * delta[t+1]                            one scan
    delta_k  = scan_D(e + shift((J - D)^T delta_{k-1}))              k corrections
    dtheta   = sum_t (ds[t]/dtheta at fixed s[t-1])^T delta[t]       large products over all rows at once

It runs every cell under every rule on every device. The forward pass of a cell that is not in torch is a loop over
``Cell.step``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed.backends.protocol import (
    Backend,
    Description,
    Forward,
    Gradients,
    Problem,
    Upstream,
    backward_in_order,
    forward_in_order,
    in_order,
)
from statefeed.cells.protocol import Cell, Preactivations, State, Step, projected_w_hh
from statefeed.feedback.protocol import EXACT, KernelRule
from statefeed.layout import shift_left
from statefeed.scan import diagonal_scan


def unsupported_reason(cell: Cell, tensors: Sequence[Tensor], exact: bool) -> str | None:
    """None, because every layer is supported."""
    return None


def forward(problems: Sequence[Problem], save: bool) -> list[Forward]:
    return forward_in_order(_forward, problems, save)


def _forward(problem: Problem, save: bool) -> Forward:
    if problem.cell.torch_forward is None:
        return _loop(problem, save)
    layout, x = problem.layout, problem.x
    run = getattr(torch._VF, problem.cell.torch_forward)
    hx: Any = [s[None] for s in problem.state] if len(problem.state) > 1 else problem.state[0][None]
    biased = problem.named_weights.b_ih is not None
    if layout.batch_sizes is None:
        y, *final = run(layout.grid(x), hx, problem.weights, biased, 1, 0.0, False, False, False)
        y = y.flatten(0, 1)
    else:
        y, *final = run(x, layout.batch_sizes, hx, problem.weights, biased, 1, 0.0, False, False)
    return Forward(y, tuple(s[0] for s in final))


def _loop(problem: Problem, save: bool) -> Forward:
    """Run the forward pass one step at a time; saves the parts of the state besides h."""
    layout, weights = problem.layout, problem.named_weights
    cell, state, states = problem.cell, problem.state, []
    if problem.compute_dtype is not None and weights.w_hh.dtype != torch.float64:  # autocast does not cast float64
        dtypes = cell.autocast_dtypes(problem.compute_dtype, state[-1].dtype, layout.ragged)
        state = tuple(s.to(dtype) for s, dtype in zip(state, dtypes, strict=True))
    for inputs in layout.steps(_inputs(problem)):
        rows = len(inputs)
        hidden = cell.hidden_product(state[0][:rows], weights.w_hh, weights.b_hh)
        after = cell.step(inputs, hidden, tuple(s[:rows] for s in state))
        if weights.w_hr is not None:
            after = (F.linear(after[0], weights.w_hr), *after[1:])
        states.append(after)
        state = tuple(torch.cat([a, s[rows:]]) if rows < len(s) else a for a, s in zip(after, state, strict=True))
    parts = [torch.cat(part) for part in zip(*states, strict=True)]
    return Forward(parts[0], state, tuple(parts[1:]) if save else ())


def _inputs(problem: Problem) -> Tensor:
    weights = problem.named_weights
    if weights.w_ih.numel():
        return F.linear(problem.x, weights.w_ih, weights.b_ih)
    return problem.x if weights.b_ih is None else problem.x + weights.b_ih


class _Linearized(NamedTuple):
    """h before every step, and the result of the cell's ``linearize`` in the dtype that gradients are summed in."""

    h_prev: Tensor
    at: Any


def recompute(problem: Problem, done: Forward) -> Forward:
    """``saved`` is h before every step, then the fields of the cell's ``linearize``, in the order of processing."""
    if problem.reverse:
        done = done._replace(y=problem.layout.reverse(done.y))
    with _autocast(problem):
        found = _linearize(in_order(problem), done)
    return done._replace(
        saved=(found.h_prev, *found.at), y=problem.layout.reverse(done.y) if problem.reverse else done.y
    )


def linearize(problem: Problem, done: Forward) -> Any:
    """The result of the cell's ``linearize`` at the states of any backend's forward pass, rows in natural order."""
    with _autocast(problem):
        order = problem.layout.reverse if problem.reverse else (lambda rows: rows)
        at = _linearize(in_order(problem), done._replace(y=order(done.y), saved=())).at
        return type(at)(*(order(part) for part in at))


class States(NamedTuple):
    """The states before and after every step, and ``inputs`` and ``hidden``, as rows."""

    previous: State
    after: State
    preactivations: tuple[Tensor, Tensor]


def states(problem: Problem, done: Forward) -> States:
    """All states of a forward pass of this backend, or of one that saved nothing; rows in natural order.

    Cost: two products over all rows; without saved states also ``Cell.recover_states``.
    """
    with _autocast(problem):
        order = problem.layout.reverse if problem.reverse else (lambda rows: rows)
        _, step = _step(in_order(problem), done._replace(y=order(done.y)))
        inputs, hidden = step.preactivations()
        previous, after = (tuple(order(part) for part in parts) for parts in (step.previous, step.after))
        return States(previous, after, (order(inputs), order(hidden)))


def _linearize(problem: Problem, done: Forward) -> _Linearized:
    h_prev, step = _step(problem, done)
    return _Linearized(h_prev, problem.cell.linearize(step))


def _step(problem: Problem, done: Forward) -> tuple[Tensor, Step]:
    """h before every step in the dtype of y, and the argument of the cell's ``linearize``."""
    cell, layout, y = problem.cell, problem.layout, done.y
    dtype = _sum_dtype(y.dtype)
    weights = problem.named_weights
    h_prev = layout.previous(y, problem.state[0].to(y.dtype))

    computed: list[tuple[Tensor, Tensor]] = []  # torch.compile traces no functools.cache

    def preactivations() -> tuple[Tensor, Tensor]:
        if not computed:
            hidden = cell.hidden_product(h_prev.to(weights.w_hh.dtype), weights.w_hh, weights.b_hh)
            computed.append((_inputs(problem).to(dtype), hidden.to(dtype)))
        return computed[0]

    initial = tuple(s.to(dtype) for s in problem.state)
    others = done.saved or _other_parts(problem, initial, preactivations)
    after = (y.to(dtype), *others)
    previous = (h_prev.to(dtype), *(layout.previous(s, s0) for s, s0 in zip(others, initial[1:], strict=True)))
    return h_prev, Step(previous, after, preactivations)


def _other_parts(problem: Problem, initial: State, preactivations: Preactivations) -> State:
    """The parts of the state besides h after every step, if the forward pass did not save them."""
    if type(problem.cell).recover_states is not Cell.recover_states or len(initial) == 1:
        return problem.cell.recover_states(preactivations, initial, problem.layout)
    return _loop(problem, True).saved


def _saved(problem: Problem, done: Forward) -> _Linearized:
    h_prev, *at = done.saved
    return _Linearized(h_prev, problem.cell.saved_type(*at))


def mean_jacobian(problem: Problem, done: Forward) -> Tensor:
    at = _saved(problem, done).at
    return torch.cat([j.mean(0) for j in _jacobian_diagonal(problem, at, _sum_dtype(done.y.dtype))])


def _jacobian_diagonal(problem: Problem, at: Any, dtype: torch.dtype) -> State:
    weights = problem.named_weights
    w_hh = projected_w_hh(weights.w_hh, weights.w_hr).to(dtype)
    with _autocast(problem._replace(compute_dtype=None)):
        return problem.cell.jacobian_diagonal(at, w_hh)


def backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    return backward_in_order(_backward, problem, done, upstream, rule, needs_x)


def _backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    with _autocast(problem):
        delta, grad_prev = _state_gradients(problem, done, upstream, rule)
        return _parameter_gradients(problem, done, delta, grad_prev, needs_x)


class StateGradients(NamedTuple):
    """The gradients of the states, and the gradients that they pass to the previous states, as rows per part."""

    delta: State
    grad_prev: State


def state_gradients(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule) -> StateGradients:
    """State gradients under a rule; ``done`` is a result of ``recompute``, returned rows are in processing order."""
    if problem.reverse:
        reverse = problem.layout.reverse
        problem, done = in_order(problem), done._replace(y=reverse(done.y))
        upstream = upstream._replace(y=reverse(upstream.y))
    with _autocast(problem):
        return _state_gradients(problem, done, upstream, rule)


def parameter_gradients(
    problem: Problem, done: Forward, upstream: Upstream, found: StateGradients, needs_x: bool
) -> Gradients:
    """The gradients that follow from a result of ``state_gradients`` with the same arguments."""

    def run(problem: Problem, done: Forward, *_: Any) -> Gradients:
        with _autocast(problem):
            return _parameter_gradients(problem, done, *found, needs_x)

    return backward_in_order(run, problem, done, upstream, EXACT, needs_x)


def _state_gradients(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule) -> StateGradients:
    layout, at = problem.layout, _saved(problem, done).at
    dtype = _sum_dtype(done.y.dtype)
    e = [layout.scatter_final(g.to(dtype)) for g in upstream.final]
    e[0] = e[0] + layout.grid(upstream.y.to(dtype))
    if rule.name == "exact":
        return _exact(problem, at, e)
    return _feedback_scan(problem, at, e, _diagonals(problem, at, rule, dtype), rule.corrections)


def _at_unprojected(delta: State, w_hr: Tensor | None) -> State:
    """The gradients that the functions of a cell take: that at u in place of that at h, if the cell projects h."""
    return delta if w_hr is None else (_product(delta[0], w_hr), *delta[1:])


def _product(grad: Tensor, w: Tensor) -> Tensor:
    return (grad.to(w.dtype) @ w).to(grad.dtype)


def _parameter_gradients(problem: Problem, done: Forward, delta: State, grad_prev: State, needs_x: bool) -> Gradients:
    h_prev, at = _saved(problem, done)
    w_ih, w_hh, b_ih, _, w_hr = problem.named_weights
    x = problem.x
    d_inputs, d_hidden = problem.cell.local_gradient(at, _at_unprojected(delta, w_hr))
    same = d_hidden is d_inputs
    d_inputs = d_inputs.to(w_ih.dtype)
    d_hidden = d_inputs if same else d_hidden.to(w_hh.dtype)
    has_w_ih = w_ih.numel() > 0
    d_w_ih = (d_inputs.T @ x).to(w_ih.dtype) if has_w_ih else torch.empty_like(w_ih)
    d_weights = [d_w_ih, problem.cell.grad_w_hh(d_hidden, h_prev, w_hh)]
    if b_ih is not None:
        d_weights += [d_inputs.sum(0), d_hidden.sum(0)]
    if w_hr is not None:
        d_weights.append((delta[0].to(w_hr.dtype).T @ problem.cell.unprojected(at).to(w_hr.dtype)).to(w_hr.dtype))
    return Gradients(
        ((d_inputs @ w_ih) if has_w_ih else d_inputs).to(x.dtype) if needs_x else None,
        tuple(problem.layout.first(d).to(s.dtype) for d, s in zip(grad_prev, problem.state, strict=False)),
        tuple(d_weights),
    )


def _diagonals(problem: Problem, at: Any, rule: KernelRule, dtype: torch.dtype) -> State:
    """D per part of the state: (width,) if stationary, else rows."""
    sizes = problem.sizes
    if rule.name == "direct":
        direct_path = problem.cell.direct_path(at)
        zeros = problem.weights[1].new_zeros(max(sizes), dtype=dtype)
        return tuple(zeros[:size] if p is None else p for p, size in zip(direct_path, sizes, strict=True))
    if rule.name == "jacobian":
        return _jacobian_diagonal(problem, at, dtype)
    if rule.diagonal is None or rule.name not in ("stationary", "per_row"):
        raise ValueError(
            f'a kernel rule must be "exact", "stationary", "per_row", "direct" or "jacobian", got {rule.name!r}'
        )
    return tuple(torch.split(rule.diagonal.to(dtype), list(sizes), -1))


def _feedback_scan(problem: Problem, at: Any, e: list[Tensor], D: State, corrections: int) -> StateGradients:
    """One scan per correction and part of the state; h first, because other parts receive gradients through h."""
    cell, layout, weights = problem.cell, problem.layout, problem.named_weights

    def scan(residual: list[Tensor] | None) -> State:
        delta: State = ()
        same_step: tuple[Tensor, ...] = ()
        for part, inputs in enumerate(e):
            if part:
                inputs = inputs + layout.grid(same_step[part - 1])
            if residual is not None:
                inputs = inputs + shift_left(layout.grid(residual[part]))
            a = D[part] if D[part].dim() == 1 else shift_left(layout.grid(D[part]))
            delta = (*delta, layout.rows(diagonal_scan(inputs, a, reverse=True)))
            if not part:
                same_step = cell.same_step(at, _at_unprojected(delta, weights.w_hr)[0])
        return delta

    residual = None
    direct_path = cell.direct_path(at)
    delta = scan(None)
    for _ in range(corrections):
        # (J - D)^T delta of the previous round: the direct path minus D, then the part through the weights.
        _, d_hidden = cell.local_gradient(at, _at_unprojected(delta, weights.w_hr))
        residual = [_residual(p, d, g) for p, d, g in zip(direct_path, D, delta, strict=True)]
        residual[0] = residual[0] + cell.grad_h(d_hidden, weights.w_hh).to(delta[0].dtype)
        delta = scan(residual)
    grad_prev = tuple(d * g for d, g in zip(D, delta, strict=True))
    if residual is not None:
        grad_prev = tuple(g + r for g, r in zip(grad_prev, residual, strict=True))
    return StateGradients(delta, grad_prev)


def _residual(direct_path: Tensor | None, D: Tensor, delta: Tensor) -> Tensor:
    return -D * delta if direct_path is None else (direct_path - D) * delta


def _exact(problem: Problem, at: Any, e: list[Tensor]) -> StateGradients:
    """Exact BPTT, one step at a time."""
    cell, layout, weights = problem.cell, problem.layout, problem.named_weights
    parts = [layout.steps(part) for part in at]
    grad_next = [torch.zeros_like(grid[-1]) for grid in e]
    deltas, grads_prev = [], []
    for t in reversed(range(layout.T)):
        now = type(at)(*(part[t] for part in parts))
        rows = len(now[0])
        delta: State = ()
        same_step: tuple[Tensor, ...] = ()
        for part, grid in enumerate(e):
            total = grid[t, :rows] + grad_next[part][:rows]
            if part:
                total = total + same_step[part - 1]
            delta = (*delta, total)
            if not part:
                grad_u = _at_unprojected(delta, weights.w_hr)
                same_step = cell.same_step(now, grad_u[0])
        _, d_hidden = cell.local_gradient(now, (grad_u[0], *delta[1:]))
        grad_prev = [
            torch.zeros_like(d) if p is None else p * d for p, d in zip(cell.direct_path(now), delta, strict=True)
        ]
        grad_prev[0] = grad_prev[0] + cell.grad_h(d_hidden, weights.w_hh).to(delta[0].dtype)
        for total, grad in zip(grad_next, grad_prev, strict=True):
            total[:rows] = grad
        deltas.append(delta)
        grads_prev.append(tuple(grad_prev))
    parts_in_time = (
        tuple(torch.cat(list(part)[::-1]) for part in zip(*steps, strict=True)) for steps in (deltas, grads_prev)
    )
    return StateGradients(*parts_in_time)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _autocast(problem: Problem) -> torch.autocast:
    """The autocast context of the forward pass; disabled on a device without autocast, such as meta."""
    device = problem.x.device.type
    if problem.compute_dtype is None:
        device = device if torch.amp.is_autocast_available(device) else "cpu"
    return torch.autocast(device, problem.compute_dtype, problem.compute_dtype is not None)


def describe(cell: Cell, x: Tensor, exact: bool) -> Description:
    loop = "one step after the other, in PyTorch"
    return Description(
        forward="torch's layer without autograd" if cell.torch_forward is not None else loop,
        backward=loop if exact else "one scan and products over all steps, in PyTorch",
        why="no kernels support the layer",
        saves_states=cell.torch_forward is None,
        recomputes_gates=cell.gates > 1,
    )


BACKEND = Backend(
    "reference", unsupported_reason, forward, recompute, mean_jacobian, backward, describe=describe, fallback=True
)
