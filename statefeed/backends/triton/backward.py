"""Backward pass of a rule, and mean Jacobian.

    d      = local gradients of delta[t] = e[t] + D[t+1] * delta[t+1]      one reverse pass, two with chunks
    dx     = d_input W_ih,   dW_ih = d_input^T x,   dW_hh = d_hidden^T h'  torch's products over all rows

Sums are computed in float32 for every dtype except float64, which uses float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statefeed.backends.protocol import Weights
from statefeed.backends.triton import reverse as kernels
from statefeed.backends.triton.cells import CELLS
from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.gather import Columns, columns
from statefeed.backends.triton.launches import Reverse
from statefeed.backends.triton.precision import matmul_precision
from statefeed.backends.triton.projection import OfProjection, ProjectedReverse, mean_projected
from statefeed.backends.triton.rules import RULES
from statefeed.backends.triton.sizes import Sizes, adjacent, columns_of, head_width, sizes_of, steps_of
from statefeed.cells import CELLS as TABLE
from statefeed.scan import chunks
from statefeed.scan.triton import device_of


def mean_jacobian(
    cell: str, inputs: Tensor, gates: Tensor, saved: Tensor, y: Tensor, w_hh: Tensor, B: int, offsets: Tensor | None
) -> Tensor:
    """The mean of diag(J[t]) over all rows, (S,) in float32 or float64; arguments as for ``recompute``.

    ``w_hh`` is ``projected_w_hh`` if the cell projects h.

    Cost: one pass over the gates.
    """
    this, H, N = CELLS[cell], y.shape[-1], len(inputs)
    dtype = torch.promote_types(y.dtype, torch.float32)
    if this.projects:
        with device_of(y), torch.no_grad():
            return mean_projected(this, gates, saved, w_hh.to(dtype))
    state = adjacent(y) if this.gates == 1 else inputs[:, -columns(0, H, inputs.dtype).width :]
    T = steps_of(N, B, offsets)
    with device_of(y):
        lanes, length, grid = chunks.launch(T, B * H, y)
        sums = torch.empty((grid[1] * B, this.states * H), dtype=dtype, device=y.device)
        kernels.add_jacobians[grid](
            gates, saved, state, state.stride(0), w_hh.to(y.dtype).contiguous(), offsets, sums, T, B, H, length,
            **this.constants, HEAD=head_width(w_hh, H),
            PAIRS=chunks.pairs(H, state), ACC=chunks.accumulator(dtype), LANES=lanes,
        )  # fmt: skip
        return sums.sum(0) / N


def backward(
    cell: str,
    rule: str,
    inputs: Tensor,
    gates: Tensor,
    saved: Tensor,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    diagonal: Tensor | None,
    offsets: Tensor | None,
    corrections: int,
    reverse: bool,
    needs_x: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of one layer in one direction under a rule.

        carry[t] = D[t] * delta_k[t] + ((J - D)^T delta_{k-1})[t],     delta_k[t] = e[t] + carry[t+1]

    Args:
        cell, x, y, state, weights, offsets, reverse, precision: as for ``recompute``.
        rule: ``"stationary"``, ``"per_row"``, ``"direct"`` or ``"jacobian"``.
        inputs, gates, saved: results of ``recompute``, or of a cell with ``from_states`` h before the step, the
            pre-activations and the saved values; gates and saved are overwritten. Products run in the dtype of inputs.
        grads: gradient of y, then of every final state (B, H); None means zero.
        diagonal: D, (S,) for ``"stationary"``, (N, S) for ``"per_row"``, else None.
        corrections: number of corrections with the full Jacobian.
        needs_x: whether to compute the gradient of x.

    Returns:
        The gradients of x, h, c, n, w_ih, w_hh, b_ih, b_hh and w_hr, in the dtypes of these tensors; empty if the
        argument does not exist.

    Gradient: none; this function computes gradients.

    Raises:
        ValueError: an unknown rule, or a diagonal of the wrong shape.

    Cost: three products over all rows and one more per correction; if h is projected, that with w_hr in every pass, its
        gradient, and under ``"jacobian"`` the product of ``diagonal_of_h``. The pass over time reads e and the gates,
        with chunks those that the diagonal depends on twice, and writes the gradients at the gates.
    """
    this, size, named = CELLS[cell], sizes_of(x, state, offsets), Weights.of(weights)
    H, dtype = size.H, inputs.dtype
    where, head = columns_of(this, size, dtype), head_width(named.w_hh, size.O)
    w_ih, w_hh = named.w_ih.to(dtype), named.w_hh.to(dtype)
    h, diagonal = where.h(inputs), _checked_diagonal(rule, diagonal, size, this)
    with device_of(y), matmul_precision(precision):
        d, d_candidate = (gates, saved if this.shared_gates < this.gates else None) if this.gates > 1 else (None, None)
        if corrections or d is None or d.dtype != dtype:
            d = inputs.new_empty((size.N, this.gates * H))
            d_candidate = None if d_candidate is None else torch.empty_like(d_candidate)
        launch: Reverse | ProjectedReverse
        if named.w_hr is None:
            reads = (gates, saved, adjacent(y) if this.gates == 1 else h)
            launch = Reverse(this, rule, size, offsets, reverse, *reads)
        else:
            of_h = OfProjection(w_hh, named.w_hr.to(dtype), diagonal)
            launch = ProjectedReverse(this, rule, size, offsets, reverse, gates, saved, h, of_h)
        initial = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in state]
        fixed = (w_hh, diagonal, None if grads[0] is None else adjacent(grads[0]), grads[1:], initial)

        # The parts of d_hidden, each with its rows of W_hh.
        shared = this.shared_gates * H
        hidden = [(d if d_candidate is None else d[:, :shared], w_hh[:shared])]
        if d_candidate is not None:
            hidden.append((d_candidate, w_hh[shared:]))
        residual = launch.residual() if corrections else ()
        into = residual[0][:, : size.O] if corrections else d[:0]
        for k in range(corrections):
            launch(*fixed, residual if k else (), residual, d, d_candidate, None)
            for part, w in hidden:
                if head:
                    into += TABLE[cell].grad_h(part, w)
                elif into.dtype == part.dtype:
                    into.addmm_(part, w)
                else:
                    into += part @ w
        sums = launch.accumulator((launch.grid[1] * size.B, this.sums, H)) if named.b_ih is not None else None
        launch(*fixed, residual, (), d, d_candidate, sums)

        if not this.gathers_x:
            d_ih = d.T @ x.to(dtype) if w_ih.numel() else torch.empty_like(w_ih)
            d_hh = TABLE[cell].grad_w_hh(d, h, w_hh) if head else d.T @ h
        else:
            d_ih, d_hh = _weight_gradients(where, size, inputs, d, d_candidate, shared)
        d_ih, d_hh = d_ih.to(weights[0].dtype), d_hh.to(weights[1].dtype)
        d_x = x.new_empty(0)
        if needs_x:
            d_x = (d @ w_ih).to(x.dtype) if w_ih.numel() else d.to(x.dtype, copy=True)
        biases = (x.new_empty(0), x.new_empty(0))
        if sums is not None:
            total = (sums.sum(0) if size.N else sums.new_zeros(sums.shape[1:])).to(weights[2].dtype)
            b_ih = total[: this.gates].flatten()
            b_hh = torch.cat([total[:2], total[3:]]).flatten() if this.shared_gates < this.gates else b_ih.clone()
            biases = (b_ih, b_hh)
        d_hr = x.new_empty(0)
        if isinstance(launch, ProjectedReverse) and named.w_hr is not None:
            d_hr = (launch.delta.T @ launch.output).to(named.w_hr.dtype)
    parts = (*initial, x.new_empty(0), x.new_empty(0))[:3]
    return d_x, *parts, d_ih, d_hh, *biases, d_hr


def _checked_diagonal(rule: str, diagonal: Tensor | None, size: Sizes, cell: Cell) -> Tensor | None:
    """D, contiguous and with checked shape; the kernels do not check it."""
    S = size.O + (cell.states - 1) * size.H
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(RULES)
    shapes |= {"stationary": (S,), "per_row": (size.N, S)}
    if rule not in shapes:
        raise ValueError(f"the rule must be one of {', '.join(RULES)}, got {rule!r}")
    if (None if diagonal is None else tuple(diagonal.shape)) != shapes[rule]:
        shape = None if diagonal is None else tuple(diagonal.shape)
        raise ValueError(f"the diagonal of rule {rule!r} must have the shape {shapes[rule]}, got {shape}")
    return None if diagonal is None else diagonal.contiguous()


def _weight_gradients(
    where: Columns, size: Sizes, inputs: Tensor, d: Tensor, d_candidate: Tensor | None, shared: int
) -> tuple[Tensor, Tensor]:
    """d_input^T x and d_hidden^T h."""
    x, h = where.x(inputs), where.h(inputs)
    if d_candidate is None:
        if not size.fused:
            return d.T @ x, d.T @ h
        both = d.T @ inputs
        return where.x(both).contiguous(), where.h(both).contiguous()
    d_ih, d_hh = inputs.new_empty((d.shape[1], size.I)), inputs.new_empty((d.shape[1], size.H))
    torch.mm(d_candidate.T, h, out=d_hh[shared:])
    if size.fused:
        both = d[:, :shared].T @ inputs
        d_ih[:shared], d_hh[:shared] = where.x(both), where.h(both)
        torch.mm(d[:, shared:].T, x, out=d_ih[shared:])
    else:
        torch.mm(d.T, x, out=d_ih)
        torch.mm(d[:, :shared].T, h, out=d_hh[:shared])
    return d_ih, d_hh
