"""One layer in one direction through the fused kernels: forward, and backward in chunks of time that stay in cache.

    d      = local gradients of delta[t] = e[t] + D[t+1] * delta[t+1]      one reverse pass over memory per chunk
    dx     = d_input W_ih,   dW_ih += d_input^T x,   dW_hh += d_hidden^T h'   while the chunk's d is in cache

Only x, y and the tape have T * B rows: no buffer for d, for D or for the states before each step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

_CELLS = {"gru": 0, "lstm": 1, "rnn_tanh": 2, "rnn_relu": 3}
_MODES = {"gate": 1, "bptt": 1, "jacobian": 2}
_CHUNK_ROWS = 512

_ops = torch.ops.statefeed


class Tape(NamedTuple):
    """What the forward pass leaves for the backward: rows of gates and of the GRU's q or the LSTM's c; an RNN's y."""

    gates: Tensor
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
) -> tuple[Tensor, tuple[Tensor, ...], Tape | None]:
    """Outputs, final state and tape of one layer in one direction.

    Args:
        cell: ``"gru"``, ``"lstm"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        x: (T, B, I), or packed rows (N, I) with ``batch_sizes``; float32 or float64 like everything else.
        state: (h,) or (h, c), each (B, H).
        weights: w_ih (G*H, I), w_hh (G*H, H) and, if there are biases, b_ih and b_hh (G*H,).
        batch_sizes: rows of every step, int64, non-increasing; None if x is dense.
        keep: whether a backward will follow; without, no tape is written.

    Returns:
        y, the shape of x with H in place of I; the final state; the tape, or None.

    Gradient: none by itself; ``backward`` is its counterpart.

    Cost: two products over all rows; 4 H numbers a row kept for a GRU, 5 H for an LSTM, none for an RNN.
    """
    w_ih, w_hh, *biases = weights
    H = w_hh.shape[1]
    gates = w_hh.shape[0] // H
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    h0, *c0 = (s.contiguous() for s in state)
    y = rows.new_empty(len(rows), H)
    bias, hidden_bias = _biases(cell, biases, H)
    packed_ih, packed_hh = _ops.pack(w_ih.contiguous(), 1), _ops.pack(w_hh.contiguous(), gates)
    c = c0[0].clone() if c0 else None
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    extra = rows.new_empty(len(rows), H) if keep and gates > 1 else None
    tape_gates = y if gates == 1 else rows.new_empty(len(rows), gates * H) if keep else None
    previous = h0
    scratch = None
    for chunk in _chunks(len(rows), len(h0), sizes):
        part = slice(chunk.first_row, chunk.last_row)
        if tape_gates is not None:
            target = tape_gates[part]
        else:
            scratch = rows.new_empty(chunk.rows, gates * H) if scratch is None else scratch
            target = scratch[: chunk.rows]
        _ops.product(rows[part], packed_ih, bias, target, False)
        first = previous[: chunk.batch]
        step_sizes = None if batch_sizes is None else batch_sizes[chunk.steps]
        _ops.forward_steps(
            _CELLS[cell], packed_hh, hidden_bias, first, target, None if extra is None else extra[part], y[part], c, step_sizes
        )
        previous = y[chunk.last_row - chunk.last_batch : chunk.last_row]
    final = h0.clone() if len(rows) == 0 else y[_last_rows(sizes, len(h0), len(rows))]
    tape = Tape(tape_gates, extra) if keep and tape_gates is not None else None
    return y.reshape(*x.shape[:-1], H), (final, *(() if c is None else (c,))), tape


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
) -> Gradients:
    """Gradients of one layer in one direction under a feedback rule, or exactly.

        carry[t] = D[t] * delta_k[t] + ((J - D)^T delta_{k-1})[t],     delta_k[t] = e[t] + carry[t+1]

    Args:
        cell, x, state, weights, batch_sizes: as given to ``forward``.
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
    gates, states = w_hh.shape[0] // H, len(state)
    rows, outputs = x.reshape(-1, x.shape[-1]).contiguous(), y.reshape(-1, H)
    e = grads[0].reshape(-1, H).contiguous()
    h0, *c0 = (s.contiguous() for s in state)
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    mode = 0 if isinstance(diagonal, Tensor) else _MODES[diagonal]
    D = diagonal.to(y.dtype).contiguous() if isinstance(diagonal, Tensor) else None
    if diagonal == "jacobian":
        D = own_weights(w_hh)
    chunks = _chunks(len(rows), len(h0), sizes)
    most = max((chunk.rows for chunk in chunks), default=0)
    d = rows.new_empty(most, gates * H)
    d_hidden = rows.new_empty(most, H) if cell == "gru" else None
    sums = rows.new_zeros(4 if gates > 1 else 1, H)
    residual = rows.new_empty(len(rows), states * H) if corrections else None
    packed_hh = _ops.pack_transposed(w_hh.contiguous()) if corrections or diagonal == "bptt" else None
    packed_ih = _ops.pack_transposed(w_ih.contiguous()) if needs_x else None
    d_x = torch.empty_like(rows) if needs_x else None
    d_ih, d_hh = torch.zeros_like(w_ih), torch.zeros_like(w_hh)
    shared = slice(0, 2 * H) if cell == "gru" else slice(0, gates * H)

    for k in range(corrections + 1):
        carry = torch.cat([g.to(y.dtype) for g in grads[1:]], 1)
        sums.zero_()
        for chunk in reversed(chunks):
            part, n = slice(chunk.first_row, chunk.last_row), chunk.rows
            before = slice(chunk.first_row - chunk.batch_before, chunk.first_row)
            first_h = outputs[before] if chunk.first_row else h0
            first_c = None if not c0 else tape.extra[before] if chunk.first_row else c0[0]  # type: ignore[index]
            here = None if residual is None else residual[part]
            own, own_hidden = d[:n], None if d_hidden is None else d_hidden[:n]
            _ops.reverse_steps(
                _CELLS[cell], mode, tape.gates[part], None if tape.extra is None else tape.extra[part], outputs[part],
                first_h[: chunk.batch], None if first_c is None else first_c[: chunk.batch], e[part], D,
                here if k else None, here if k < corrections else None,
                packed_hh if diagonal == "bptt" else None, carry, own, own_hidden, sums,
                None if batch_sizes is None else batch_sizes[chunk.steps],
            )  # fmt: skip
            if k < corrections:
                assert here is not None and packed_hh is not None
                _add_hidden_product(own, own_hidden, packed_hh, w_hh, here[:, :H])
                continue
            if d_x is not None:
                _ops.product(own, packed_ih, None, d_x[part], False)
            _ops.add_row_products(own, rows[part], d_ih)
            for d_rows, h_rows in _before(own, first_h, outputs, chunk, sizes):
                _ops.add_row_products(d_rows[:, shared], h_rows, d_hh[shared])
            if own_hidden is not None:
                for d_rows, h_rows in _before(own_hidden, first_h, outputs, chunk, sizes):
                    _ops.add_row_products(d_rows, h_rows, d_hh[2 * H :])
    d_weights = [d_ih, d_hh]
    if biases:
        b_ih, b_hh = (sums[:3], sums[[0, 1, 3]]) if cell == "gru" else (sums, sums.clone())
        d_weights += [b_ih.reshape(-1), b_hh.reshape(-1)]
    d_state = carry.split(H, 1)
    return Gradients(None if d_x is None else d_x.reshape(x.shape), tuple(d_state), d_weights)


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
    _ops.sum_jacobians(
        _CELLS[cell], tape.gates, tape.extra, rows, h0, c0[0] if c0 else None, own_weights(w_hh), sums, batch_sizes
    )
    return sums / len(rows)


def own_weights(w_hh: Tensor) -> Tensor:
    """The weight from every unit to itself, per gate: (G, H)."""
    H = w_hh.shape[1]
    return w_hh.reshape(-1, H, H).diagonal(dim1=1, dim2=2).contiguous()


class _Chunk(NamedTuple):
    steps: slice
    first_row: int
    last_row: int
    batch: int  # rows of its first step
    last_batch: int
    batch_before: int  # rows of the step before it

    @property
    def rows(self) -> int:
        return self.last_row - self.first_row


def _chunks(rows: int, batch: int, sizes: list[int] | None) -> list[_Chunk]:
    """Stretches of whole steps with about ``_CHUNK_ROWS`` rows each."""
    if rows == 0:
        return []
    if sizes is None:
        steps, each = rows // batch, max(1, _CHUNK_ROWS // batch)
        return [
            _Chunk(slice(t, min(t + each, steps)), t * batch, min(t + each, steps) * batch, batch, batch, batch)
            for t in range(0, steps, each)
        ]
    chunks, t, row, before = [], 0, 0, 0
    while t < len(sizes):
        first, first_row = t, row
        while t < len(sizes) and (t == first or row + sizes[t] - first_row <= _CHUNK_ROWS):
            row += sizes[t]
            t += 1
        chunks.append(_Chunk(slice(first, t), first_row, row, sizes[first], sizes[t - 1], before))
        before = sizes[t - 1]
    return chunks


def _biases(cell: str, biases: list[Tensor], H: int) -> tuple[Tensor | None, Tensor | None]:
    """What enters the input product, and what must wait for the GRU's reset gate."""
    if not biases:
        return None, None
    b_ih, b_hh = biases
    if cell != "gru":
        return b_ih + b_hh, None
    return torch.cat([b_ih[: 2 * H] + b_hh[: 2 * H], b_ih[2 * H :]]), b_hh[2 * H :].contiguous()


def _last_rows(sizes: list[int] | None, batch: int, rows: int) -> slice | Tensor:
    """The row of every sequence's last step."""
    if sizes is None:
        return slice(rows - batch, rows)
    last, row = [0] * batch, 0
    for size in sizes:
        last[:size] = range(row, row + size)
        row += size
    return torch.tensor(last)


def _before(
    d: Tensor, first_h: Tensor, outputs: Tensor, chunk: _Chunk, sizes: list[int] | None
) -> list[tuple[Tensor, Tensor]]:
    """Rows of d beside the states before them, without copying a state."""
    if sizes is None:
        inside = outputs[chunk.first_row : chunk.last_row - chunk.batch]
        return [(d[: chunk.batch], first_h), (d[chunk.batch :], inside)]
    pairs, row, before = [(d[: chunk.batch], first_h[: chunk.batch])], chunk.batch, 0
    for t in range(chunk.steps.start + 1, chunk.steps.stop):
        start = chunk.first_row + before
        pairs.append((d[row : row + sizes[t]], outputs[start : start + sizes[t]]))
        before, row = before + sizes[t - 1], row + sizes[t]
    return pairs


def _add_hidden_product(d: Tensor, d_hidden: Tensor | None, packed_hh: Tensor, w_hh: Tensor, out: Tensor) -> None:
    """out += d_hidden W_hh; the GRU's d_hidden is d for r and z and a buffer of its own for n."""
    H = w_hh.shape[1]
    if d_hidden is None:
        _ops.product(d, packed_hh, None, out, True)
        return
    _ops.product(torch.cat([d[:, : 2 * H], d_hidden], 1), packed_hh, None, out, True)
