"""One layer in one direction on a GPU: torch's own forward, and a backward of one pass over memory between products.

    d      = local gradients of delta[t] = e[t] + D[t+1] * delta[t+1]      one reverse pass, two where time is cut
    dx     = d_input W_ih,   dW_ih = d_input^T x,   dW_hh = d_hidden^T h'  torch's products over all rows

The forward pass keeps nothing but its results; the gates are computed anew in one batched product and overwritten by
their gradients. Whatever the dtype of the rows, sums run in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from statefeed.backends.cpu.layer import Gradients
from statefeed.backends.triton import reverse
from statefeed.scan import chunks
from statefeed.scan.triton import WIDE, cell_states


class Tape(NamedTuple):
    """What a backward pass reads, and overwrites: all that a row needs besides the gradients of the outputs.

    Attributes:
        gates: pre-activations, (N, G * H); None for an RNN.
        extra: the GRU's q or the LSTM's c before the step, (N, H).
        before: h before the step, (N, H).
        offsets: the first row of every step and their end, (T + 1,); None if every step has B rows.
        T: steps.
        B: rows of the first step.
    """

    gates: Tensor | None
    extra: Tensor | None
    before: Tensor
    offsets: Tensor | None
    T: int
    B: int


def tape(
    cell: str,
    x: Tensor,
    y: Tensor,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
) -> Tape:
    """What the forward pass did not keep, computed anew in the dtype of y.

    Args:
        cell: ``"gru"``, ``"lstm"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        x: (T, B, I), or packed rows (N, I) with ``batch_sizes``.
        y: what torch's layer returned, (T, B, H) or (N, H): float32, float64, bfloat16 or float16.
        state: (h,) or (h, c), each (B, H).
        weights: w_ih (G*H, I), w_hh (G*H, H) and, if there are biases, b_ih and b_hh (G*H,).
        batch_sizes: rows of every step, int64 on the CPU, non-increasing; None if x is dense.

    Returns:
        Pre-activations of the gates, and what else the cell needs; an RNN needs h before each step only.

    Gradient: none.

    Cost: two products over all rows, none for an RNN; for an LSTM one scan.
    """
    w_ih, w_hh, *biases = (w.to(y.dtype) for w in weights)
    H = w_hh.shape[1]
    rows, outputs = x.reshape(-1, x.shape[-1]).to(y.dtype), y.reshape(-1, H)
    before, offsets = _before(outputs, state[0].to(y.dtype), batch_sizes)
    lies = (before, offsets, len(y) if batch_sizes is None else len(batch_sizes), len(state[0]))
    if len(w_hh) == H:
        return Tape(None, None, *lies)
    joined = 2 * H if cell == "gru" else 4 * H
    b_ih, b_hh = biases or (None, None)
    if b_ih is not None and b_hh is not None:
        b_ih = torch.cat([b_ih[:joined] + b_hh[:joined], b_ih[joined:]])
    gates = F.linear(rows, w_ih, b_ih)
    gates[:, :joined].addmm_(before, w_hh[:joined].T)
    if cell == "gru":
        return Tape(gates, F.linear(before, w_hh[joined:], None if b_hh is None else b_hh[joined:]), *lies)
    return Tape(
        gates, cell_states(gates, state[1].to(torch.promote_types(y.dtype, torch.float32)).contiguous(), offsets), *lies
    )


def backward(
    cell: str,
    tape: Tape,
    x: Tensor,
    y: Tensor,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    grads: tuple[Tensor, ...],
    diagonal: Tensor | Literal["gate", "jacobian"],
    corrections: int = 0,
    needs_x: bool = True,
) -> Gradients:
    """Gradients of one layer in one direction under a feedback rule.

        carry[t] = D[t] * delta_k[t] + ((J - D)^T delta_{k-1})[t],     delta_k[t] = e[t] + carry[t+1]

    Args:
        cell, x, y, state, weights: as given to ``tape``.
        tape: what it returned; used up.
        grads: gradient of y, then of every final state (B, H).
        diagonal: (S,) fixed, ``"gate"`` or ``"jacobian"``.
        corrections: how often the dense rest of the Jacobian is fed back.
        needs_x: whether the gradient of x is wanted.

    Returns:
        The gradients of x, of the initial state and of the weights, in the order and dtypes of what they belong to.

    Gradient: none; it is one.

    Cost: three products over all rows and one more per correction. The pass between them reads e, the tape and, in
        chunks, as much of them as the diagonal takes once more; it writes the gradients at the gates.
    """
    w_ih, w_hh = (w.to(y.dtype) for w in weights[:2])
    H, wide = w_hh.shape[1], torch.promote_types(y.dtype, torch.float32)
    rows = x.reshape(-1, x.shape[-1]).to(y.dtype)
    e, final_e = grads[0].reshape(-1, H).contiguous(), torch.cat([g.to(wide) for g in grads[1:]], 1)
    rule = diagonal if isinstance(diagonal, str) else "stationary"
    reads = (cell, rule, *_reads(tape, y), _own(diagonal, w_hh, wide), e, final_e)
    d, d_q = tape.gates, tape.extra if cell == "gru" else None
    if corrections:
        d, d_q = (None if v is None else torch.empty_like(v) for v in (d, d_q))
    d = torch.empty_like(tape.before) if d is None else d
    # d_hidden part by part, and the rows of W_hh that each belongs to.
    hidden = [(d, slice(None))] if d_q is None else [(d[:, : 2 * H], slice(2 * H)), (d_q, slice(2 * H, None))]
    first = torch.empty_like(final_e)
    sums = _sums(tape, 1 if tape.gates is None else 4, final_e) if len(weights) > 2 else None

    residual = final_e.new_empty((len(e) if corrections else 0, final_e.shape[1]))
    for k in range(corrections):
        _reverse(*reads, residual, k > 0, True, d, d_q, None, first, tape.T, tape.B)
        for part, of in hidden:
            residual[:, :H] += part @ w_hh[of]
    _reverse(*reads, residual, corrections > 0, False, d, d_q, sums, first, tape.T, tape.B)

    d_hh = torch.cat([part.T @ tape.before for part, _ in hidden])
    d_weights = [d.T @ rows, d_hh]
    if sums is not None:
        total = sums.sum(0)
        d_weights += [total[:3], total[[0, 1, 3]]] if cell == "gru" else [total, total.clone()]
    d_x = (d @ w_ih).view(x.shape).to(x.dtype) if needs_x else None
    d_state = tuple(g.to(s.dtype) for g, s in zip(torch.split(first, H, 1), state, strict=True))
    return Gradients(d_x, d_state, [g.to(w.dtype).view(w.shape) for g, w in zip(d_weights, weights, strict=True)])


def mean_jacobian(cell: str, tape: Tape, y: Tensor, w_hh: Tensor) -> Tensor:
    """The mean of diag(J[t]) over all rows, (S,) in float32 or float64; arguments as for ``backward``.

    Cost: one pass over the tape.
    """
    own = _own("jacobian", w_hh, torch.promote_types(y.dtype, torch.float32))
    sums = _sums(tape, 2 if cell == "lstm" else 1, own)
    _sum_jacobians(cell, *_reads(tape, y), own, sums, tape.T, tape.B)
    return sums.sum(0).flatten() / len(tape.before)


def _reads(tape: Tape, y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The rows that ``factors`` takes, and where they lie: an RNN's slope is a function of its output."""
    state = y.reshape(len(tape.before), -1).contiguous() if tape.gates is None else tape.before
    return tape.gates, tape.extra, state, tape.offsets


def _sums(tape: Tape, parts: int, like: Tensor) -> Tensor:
    """Room for the sums over time of every chunk and sequence, (C * B, parts, H)."""
    H = tape.before.shape[1]
    count = chunks.cut(tape.T, tape.B * H, tape.before).grid[1]
    return like.new_empty((count * tape.B, parts, H))


def _own(diagonal: Tensor | str, w_hh: Tensor, dtype: torch.dtype) -> Tensor:
    """(4, H): the stationary diagonals of h and c, or the weight from every unit to itself, gate by gate."""
    H = w_hh.shape[1]
    own = torch.zeros((4, H), dtype=dtype, device=w_hh.device)
    if isinstance(diagonal, Tensor):
        own[: len(diagonal) // H] = diagonal.reshape(-1, H)
    elif diagonal == "jacobian":
        own[: len(w_hh) // H] = w_hh.reshape(-1, H, H).diagonal(dim1=1, dim2=2)
    return own


def _before(y: Tensor, initial: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows of y one step earlier, ``initial`` before the first, and the first row of every step if packed."""
    rows = torch.cat([initial, y])
    if batch_sizes is None:
        return rows[: len(y)], None
    # A step's rows lie behind as many as the step before it has; the first step's are those of the initial state.
    sizes = batch_sizes.to(y.device)
    gap = len(initial) - torch.cat([sizes.new_full((1,), len(initial)), sizes[:-1]])
    index = torch.arange(len(y), device=y.device) + gap.repeat_interleave(sizes, output_size=len(y))
    return rows[index], F.pad(sizes.cumsum(0), (1, 0))


@torch.library.custom_op(
    "statefeed::triton_reverse",
    mutates_args=("residual", "d", "d_q", "sums", "first"),
)
def _reverse(
    cell: str,
    rule: str,
    gates: Tensor | None,
    extra: Tensor | None,
    state: Tensor,
    offsets: Tensor | None,
    own: Tensor,
    e: Tensor,
    final_e: Tensor,
    residual: Tensor,
    given: bool,
    next: bool,
    d: Tensor,
    d_q: Tensor | None,
    sums: Tensor | None,
    first: Tensor,
    T: int,
    B: int,
) -> None:
    """One pass of a rule; ``residual`` holds the one before if ``given``, and takes the next one's direct part."""
    if not e.numel():
        return
    H = e.shape[1]
    units, length, grid = chunks.cut(T, B * H, state)
    constants = {"CELL": cell, "RULE": rule, "WIDE": WIDE.get(e.dtype, tl.float32), "LANES": units}
    rows, sizes = (gates, extra, state, own, offsets, e), (T, B, H, length)
    summary = None
    if grid[1] > 1:
        summary = own.new_empty((grid[1], 5 if cell == "lstm" else 2, B * H))
        reverse.summarise[grid](*rows, residual if given else None, summary, *sizes, **constants)
    reverse.run[grid](
        *rows, final_e, residual if given else None, summary, residual if next else None, d, d_q, sums, first, *sizes,
        **constants,
    )  # fmt: skip


@torch.library.custom_op("statefeed::triton_sum_jacobians", mutates_args=("sums",))
def _sum_jacobians(
    cell: str,
    gates: Tensor | None,
    extra: Tensor | None,
    state: Tensor,
    offsets: Tensor | None,
    own: Tensor,
    sums: Tensor,
    T: int,
    B: int,
) -> None:
    if not state.numel():
        return
    H = state.shape[1]
    units, length, grid = chunks.cut(T, B * H, state)
    reverse.add_jacobians[grid](
        gates, extra, state, own, offsets, sums, T, B, H, length,
        CELL=cell, RULE="jacobian", WIDE=WIDE.get(own.dtype, tl.float32), LANES=units,
    )  # fmt: skip
