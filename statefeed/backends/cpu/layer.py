"""One layer in one direction through the C++ operators: forward, and backward in chunks of time that stay in cache.

    grad_input, grad_hidden   local gradients of delta[t] = e[t] + D[t+1] * delta[t+1], one reverse pass per chunk
    grad_x                    grad_input W_ih                             while the chunk's gradients are in cache
    grad_W_ih, grad_W_hh      += grad_input^T x,   += grad_hidden^T h'    likewise

Only x, y and what is saved have a row per step and sequence: there is no buffer for delta, for D or for the previous
states. Rows are in the order of processing; inputs and states have the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statefeed.backends.protocol import Forward, Gradients, Problem, Upstream
from statefeed.feedback.protocol import KernelRule
from statefeed.native.memory import empty


def forward(problem: Problem, save: bool) -> Forward:
    """Outputs and final state; with ``save`` also the gates and what else the cell saves, for ``backward``.

    Gradient: none; ``backward`` computes it.

    Cost: two products over all rows; ``cell.saved_values`` values per row and unit are saved.
    """
    cell, layout = problem.cell, problem.layout
    w_ih, w_hh, *biases = (w.contiguous() for w in problem.weights)
    x = problem.x.contiguous()
    h0, c0 = _initial(problem)
    N, H = x.shape[0], h0.shape[1]
    y = x.new_empty(N, H)
    c = c0.clone() if c0 is not None else None
    saved = _empty_saved(problem) if save and cell.saved_values else ()
    torch.ops.statefeed.layer_forward.default(
        cell.name, problem.compute_dtype is not None, x, w_ih, w_hh, *(biases or (None, None)), h0,
        layout.batch_sizes, *(saved or (None, None)), y, c,
    )  # fmt: skip
    others = _parts(c, H)
    if len(others) > 1:  # copies, because autograd does not let users modify one of several views in place
        others = tuple(part.clone() for part in others)
    return Forward(y, (layout.last(y, h0), *others), saved)


def backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    """Gradients under a feedback rule, or exact ones.

        carry[t] = D[t] * delta_k[t] + ((J - D)^T delta_{k-1})[t],     delta_k[t] = e[t] + carry[t+1]

    Gradient: none; this function computes gradients.

    Raises:
        RuntimeError: an argument does not have the shape or dtype that the cell and the rule require.

    Cost: three products over all rows, one more per correction or for ``"exact"``; S values per row with corrections.
    """
    cell, dtype = problem.cell, done.y.dtype
    w_ih, w_hh, *biases = (w.contiguous() for w in problem.weights)
    x = problem.x.contiguous()
    h0, c0 = _initial(problem)
    H = h0.shape[1]
    D = _w_hh_diagonals(problem) if rule.name == "jacobian" else rule.diagonal
    final = [g.to(dtype) for g in upstream.final]
    grad_final = torch.cat(final, 1) if len(final) > 1 else final[0].contiguous()
    carry = torch.empty_like(grad_final)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_w_ih, grad_w_hh = x.new_empty(w_ih.shape), x.new_empty(w_hh.shape)
    grad_biases = [torch.empty_like(b) for b in biases]
    residual = empty(len(x), sum(problem.sizes), x) if rule.corrections else None
    torch.ops.statefeed.layer_backward.default(
        cell.name, rule.name, rule.corrections, problem.compute_dtype is not None, x, w_ih, w_hh,
        *(done.saved or (None, None)), done.y.contiguous(), h0, c0,
        upstream.y.to(dtype).contiguous(), grad_final, None if D is None else D.to(dtype).contiguous(),
        problem.layout.batch_sizes, carry, grad_x, grad_w_ih, grad_w_hh,
        *(grad_biases or (None, None)), residual,
    )  # fmt: skip
    return Gradients(grad_x, _parts(carry, H), (grad_w_ih, grad_w_hh, *grad_biases))


def mean_jacobian(problem: Problem, done: Forward) -> Tensor:
    """The mean of diag(J[t]) over all rows, (S,).

    Cost: one pass over the saved values.
    """
    h0, c0 = _initial(problem)
    sums = done.y.new_zeros(sum(problem.sizes))
    torch.ops.statefeed.sum_jacobians(
        problem.cell.name, *(done.saved or (None, None)), done.y.contiguous(), h0, c0,
        _w_hh_diagonals(problem), problem.layout.batch_sizes, sums,
    )  # fmt: skip
    return sums / len(done.y)


def _empty_saved(problem: Problem) -> tuple[Tensor, Tensor]:
    """Memory for the gates, and for what the cell saves besides them."""
    cell, (N, H) = problem.cell, (len(problem.x), problem.state[0].shape[1])
    return empty(N, cell.gates * H, problem.x), empty(N, (cell.saved_values - cell.gates) * H, problem.x)


def _initial(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """h, and the other parts of the initial state side by side."""
    h0, *others = problem.state
    return h0.contiguous(), _joined(others)


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    if len(parts) > 1:
        return torch.cat(list(parts), 1)
    return parts[0].contiguous() if parts else None


def _parts(joined: Tensor | None, H: int) -> tuple[Tensor, ...]:
    if joined is None:
        return ()
    return torch.split(joined, H, 1) if joined.shape[1] > H else (joined,)


def _w_hh_diagonals(problem: Problem) -> Tensor:
    """The weight from every unit to itself, per gate: (G, H). W_hh has one square block for every gate and head."""
    w_hh, H = problem.weights[1], problem.state[0].shape[1]
    columns = w_hh.shape[1]
    return w_hh.reshape(-1, columns, columns).diagonal(dim1=1, dim2=2).reshape(-1, H).contiguous()
