"""One layer in one direction through the fused kernels: forward, and backward in chunks of time that stay in cache.

    d      = local gradients of delta[t] = e[t] + D[t+1] * delta[t+1]      one reverse pass over memory per chunk
    dx     = d_input W_ih,   dW_ih += d_input^T x,   dW_hh += d_hidden^T h'   while the chunk's d is in cache

Only x, y and the tape have T * B rows: no buffer for d, for D or for the states before each step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from statefeed.native.memory import empty

_RULES = {"gate": "direct", "bptt": "exact", "jacobian": "jacobian"}


class Tape(NamedTuple):
    """What the forward pass leaves for the backward: rows of gates and of the GRU's q or the LSTM's c; an RNN's y."""

    gates: Tensor | None
    extra: Tensor | None


class Gradients(NamedTuple):
    x: Tensor | None
    state: tuple[Tensor, ...]
    weights: list[Tensor]


def forward(
    cell: str,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    keep: bool = True,
    rounded: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], Tape]:
    """Outputs, final state and tape of one layer in one direction.

    Args:
        cell: ``"gru"``, ``"lstm"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        x: (T, B, I), or packed rows (N, I) with ``batch_sizes``; float32 or float64 like everything else.
        state: (h,) or (h, c), each (B, H).
        weights: w_ih (G*H, I), w_hh (G*H, H) and, if there are biases, b_ih and b_hh (G*H,).
        batch_sizes: rows of every step, int64, non-increasing; None if x is dense.
        keep: whether a backward will follow; without, no tape is written.
        rounded: round what enters a product to bfloat16, as autocast does, where the CPU gains by it; sums, gates and
            states stay float32.

    Returns:
        y, the shape of x with H in place of I; the final state; the tape, empty without ``keep``.

    Gradient: none by itself; ``backward`` is its counterpart.

    Cost: two products over all rows; 4 H numbers a row kept for a GRU, 5 H for an LSTM, none for an RNN.
    """
    w_ih, w_hh, *biases = weights
    H = w_hh.shape[1]
    gates = w_hh.shape[0] // H
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    h0, *c0 = (s.contiguous() for s in state)
    bias, hidden_bias = _biases(cell, biases, H)
    y = rows.new_empty(len(rows), H)
    c = c0[0].clone() if c0 else None
    tape = Tape(None, None)
    if keep and gates > 1:
        tape = Tape(empty(len(rows), gates * H, rows), empty(len(rows), H, rows))
    torch.ops.statefeed.layer_forward(
        cell,
        rounded,
        rows,
        w_ih.contiguous(),
        w_hh.contiguous(),
        bias,
        hidden_bias,
        h0,
        batch_sizes,
        *tape,
        y,
        c,
    )
    h = _last(y, h0, batch_sizes)
    return y.view(*x.shape[:-1], H), (h,) if c is None else (h, c), tape


def backward(
    cell: str,
    tape: Tape,
    x: Tensor,
    y: Tensor,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    grads: tuple[Tensor, ...],
    diagonal: Tensor | Literal["gate", "jacobian", "bptt"],
    corrections: int = 0,
    batch_sizes: Tensor | None = None,
    needs_x: bool = True,
    rounded: bool = False,
) -> Gradients:
    """Gradients of one layer in one direction under a feedback rule, or exactly.

        carry[t] = D[t] * delta_k[t] + ((J - D)^T delta_{k-1})[t],     delta_k[t] = e[t] + carry[t+1]

    Args:
        cell, x, state, weights, batch_sizes, rounded: as given to ``forward``.
        tape, y: what it returned.
        grads: gradient of y, then of every final state (B, H).
        diagonal: (S,) fixed, ``"gate"``, ``"jacobian"``, or ``"bptt"`` for the exact dense product at every step.
        corrections: how often the dense rest of the Jacobian is fed back.
        needs_x: whether the gradient of x is wanted.

    Returns:
        The gradients of x, of the initial state and of the weights, in the order of ``weights``.

    Gradient: none; it is one.

    Cost: three products over all rows, one more per correction or for ``"bptt"``; S numbers a row if corrections > 0.
    """
    w_ih, w_hh, *biases = weights
    H = w_hh.shape[1]
    rows, outputs = x.reshape(-1, x.shape[-1]).contiguous(), y.reshape(-1, H)
    h0, *c0 = (s.contiguous() for s in state)
    final_e = torch.cat([g.to(y.dtype) for g in grads[1:]], 1)
    if isinstance(diagonal, Tensor):
        rule, D = "stationary" if diagonal.dim() == 1 else "per_row", diagonal.to(y.dtype).contiguous()
    else:
        rule, D = _RULES[diagonal], _own_weights(w_hh) if diagonal == "jacobian" else None
    carry = torch.empty_like(final_e)
    d_x = torch.empty_like(rows) if needs_x else None
    d_ih, d_hh = (rows.new_empty(w.shape) for w in (w_ih, w_hh))
    sums = rows.new_empty(4 if len(w_hh) > H else 1, H)
    residual = empty(len(rows), len(state) * H, rows) if corrections else None
    torch.ops.statefeed.layer_backward(
        cell, rule, corrections, rounded, rows, w_ih.contiguous(), w_hh.contiguous(), *tape,
        outputs, h0, c0[0] if c0 else None, grads[0].reshape(-1, H).contiguous(), final_e, D, batch_sizes,
        carry, d_x, d_ih, d_hh, sums, residual,
    )  # fmt: skip
    d_weights = [d_ih, d_hh]
    if biases:
        b_ih, b_hh = (sums[:3], sums[[0, 1, 3]]) if cell == "gru" else (sums, sums.clone())
        d_weights += [b_ih.reshape(-1), b_hh.reshape(-1)]
    return Gradients(None if d_x is None else d_x.view(x.shape), torch.split(carry, H, 1), d_weights)


def mean_jacobian(
    cell: str,
    tape: Tape,
    y: Tensor,
    state: tuple[Tensor, ...],
    w_hh: Tensor,
    batch_sizes: Tensor | None = None,
) -> Tensor:
    """The mean of diag(J[t]) over all rows, (S,); arguments as for ``backward``.

    Cost: one pass over the tape.
    """
    H = w_hh.shape[1]
    h0, *c0 = (s.contiguous() for s in state)
    rows = y.reshape(-1, H)
    sums = rows.new_zeros(len(state) * H)
    torch.ops.statefeed.sum_jacobians(
        cell, *tape, rows, h0, c0[0] if c0 else None, _own_weights(w_hh), batch_sizes, sums
    )
    return sums / len(rows)


def _own_weights(w_hh: Tensor) -> Tensor:
    """The weight from every unit to itself, per gate: (G, H)."""
    H = w_hh.shape[1]
    return w_hh.reshape(-1, H, H).diagonal(dim1=1, dim2=2).contiguous()


def _biases(cell: str, biases: list[Tensor], H: int) -> tuple[Tensor | None, Tensor | None]:
    """What enters the input product, and what must wait for the GRU's reset gate."""
    if not biases:
        return None, None
    b_ih, b_hh = biases
    if cell != "gru":
        return b_ih + b_hh, None
    return torch.cat([b_ih[: 2 * H] + b_hh[: 2 * H], b_ih[2 * H :]]), b_hh[2 * H :].contiguous()


def _last(y: Tensor, h0: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """The state after every sequence's last step."""
    if len(y) == 0:
        return h0.clone()
    if batch_sizes is None:
        return y[len(y) - len(h0) :].clone()
    lengths = (batch_sizes[:, None] > torch.arange(len(h0))).sum(0)
    first_rows = batch_sizes.cumsum(0) - batch_sizes
    return y[first_rows[lengths - 1] + torch.arange(len(h0))]
