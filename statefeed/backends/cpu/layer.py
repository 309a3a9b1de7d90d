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

from statefeed.backends.protocol import Forward, Gradients, Problem, Upstream, Weights
from statefeed.cells.protocol import projected_w_hh
from statefeed.feedback.protocol import KernelRule
from statefeed.native.memory import count_unsaved, empty


def forward(problem: Problem, save: bool) -> Forward:
    """Outputs and final state; with ``save`` also the gates and what else the cell saves, for ``backward``.

    Gradient: none; ``backward`` computes it.

    Cost: two products over all rows; ``cell.saved_values`` values per row and unit are saved.
    """
    cell, layout = problem.cell, problem.layout
    w_ih, w_hh, b_ih, b_hh, w_hr = _contiguous(problem)
    x = problem.x.contiguous()
    h0, c0 = _initial(problem)
    y, h = x.new_empty(len(x), h0.shape[1]), h0.clone()
    c = None if c0 is None else torch.empty_like(c0)
    saved = _empty_saved(problem) if save and cell.saved_values else ()
    if not save:
        count_unsaved(y, cell.saved_values)
    torch.ops.statefeed.layer_forward.default(
        cell.name, problem.compute_dtype is not None, x, w_ih, w_hh, b_ih, b_hh, h0,
        layout.batch_sizes, *(saved or (None, None)), y, h, c, w_hr, c0,
    )  # fmt: skip
    others = _parts(c, [s.shape[1] for s in problem.state[1:]])
    if len(others) > 1:  # copies, because autograd does not let users modify one of several views in place
        others = tuple(part.clone() for part in others)
    return Forward(y, (h, *others), saved)


def backward(problem: Problem, done: Forward, upstream: Upstream, rule: KernelRule, needs_x: bool) -> Gradients:
    """Gradients under a feedback rule, or exact ones.

        carry[t] = D[t] * delta_k[t] + ((J - D)^T delta_{k-1})[t],     delta_k[t] = e[t] + carry[t+1]

    Gradient: none; this function computes gradients.

    Raises:
        RuntimeError: an argument does not have the shape or dtype that the cell and the rule require.

    Cost: three products over all rows, one more per correction or for ``"exact"``; S values per row with corrections.
    """
    cell, dtype = problem.cell, done.y.dtype
    w_ih, w_hh, b_ih, b_hh, w_hr = _contiguous(problem)
    x = problem.x.contiguous()
    h0, c0 = _initial(problem)
    D = _recurrent_weights(problem) if rule.name == "jacobian" else rule.diagonal
    final = [g.to(dtype) for g in upstream.final]
    grad_final = torch.cat(final, 1) if len(final) > 1 else final[0].contiguous()
    carry = torch.empty_like(grad_final)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_w_hr = (
        None if w is None else x.new_empty(w.shape) for w in (w_ih, w_hh, b_ih, b_hh, w_hr)
    )
    residual = empty(len(x), sum(problem.sizes), x) if rule.corrections else None
    torch.ops.statefeed.layer_backward.default(
        cell.name, rule.name, rule.corrections, problem.compute_dtype is not None, x, w_ih, w_hh,
        *(done.saved or (None, None)), done.y.contiguous(), h0, c0,
        upstream.y.to(dtype).contiguous(), grad_final, None if D is None else D.to(dtype).contiguous(),
        problem.layout.batch_sizes, carry, grad_x, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh,
        residual, w_hr, grad_w_hr,
    )  # fmt: skip
    found = (grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_w_hr)
    return Gradients(grad_x, _parts(carry, problem.sizes), tuple(g for g in found if g is not None))


def mean_jacobian(problem: Problem, done: Forward) -> Tensor:
    """The mean of diag(J[t]) over all rows, (S,).

    Cost: one pass over the saved values.
    """
    h0, c0 = _initial(problem)
    cell, others = problem.cell, sum(problem.sizes[1:])
    # A projected h has sum_gj du_j/dpre_gj W[gj, p]: the mean of the derivatives, then the product with W.
    of_output = len(problem.weights[1]) if cell.projects else h0.shape[1]
    sums = done.y.new_zeros(of_output + others)
    torch.ops.statefeed.sum_jacobians(
        cell.name, *(done.saved or (None, None)), done.y.contiguous(), h0, c0,
        None if cell.projects else _recurrent_weights(problem), problem.layout.batch_sizes, sums,
    )  # fmt: skip
    mean = sums / len(done.y)
    if not cell.projects:
        return mean
    return torch.cat([mean[:of_output] @ _recurrent_weights(problem), mean[of_output:]])


def _contiguous(problem: Problem) -> Weights:
    w_ih, w_hh, *others = problem.named_weights
    return Weights(w_ih.contiguous(), w_hh.contiguous(), *(None if w is None else w.contiguous() for w in others))


def _empty_saved(problem: Problem) -> tuple[Tensor, Tensor]:
    """Memory for the gates, and for what the cell saves besides them."""
    cell, N = problem.cell, len(problem.x)
    H = len(problem.weights[1]) // cell.gates
    return empty(N, cell.gates * H, problem.x), empty(N, (cell.saved_values - cell.gates) * H, problem.x)


def _initial(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """h, and the other parts of the initial state side by side."""
    h0, *others = problem.state
    return h0.contiguous(), _joined(others)


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    if len(parts) > 1:
        return torch.cat(list(parts), 1)
    return parts[0].contiguous() if parts else None


def _parts(joined: Tensor | None, widths: Sequence[int]) -> tuple[Tensor, ...]:
    if joined is None:
        return ()
    return torch.split(joined, list(widths), 1) if len(widths) > 1 else (joined,)


def _recurrent_weights(problem: Problem) -> Tensor:
    """The weight from every unit to itself, per gate: (G, H). W_hh has one square block for every gate and head.

    With a projection, ``projected_w_hh``.
    """
    weights = problem.named_weights
    if weights.w_hr is not None:
        return projected_w_hh(weights.w_hh, weights.w_hr).contiguous()
    w_hh, H = problem.weights[1], problem.state[0].shape[1]
    columns = w_hh.shape[1]
    return w_hh.reshape(-1, columns, columns).diagonal(dim1=1, dim2=2).reshape(-1, H).contiguous()
