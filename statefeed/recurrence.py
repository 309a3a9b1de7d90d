"""One layer in one direction: the exact forward pass, and beside it the backward pass as a scan and local gradients.

    delta[t] = e[t] + D[t+1] * delta[t+1]                            the scan
    delta_k  = scan_D(e + shift((J - D)^T delta_{k-1}))              k corrections
    dtheta   = sum_t (ds[t]/dtheta at fixed s[t-1])^T delta[t]       large products over all steps at once

An LSTM runs two scans, gamma over c being fed by delta over h of the same step. Time comes first; packed rows are laid
out as in torch's PackedSequence and become a (T, B, H) grid only for the scan, so padding enters no product.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed import native as kernels
from statefeed.backends.cpu import layer
from statefeed.cells import GRU, Cell
from statefeed.feedback import Feedback
from statefeed.scan import diagonal_scan

# Under "fitted", how many training backward passes it takes until another is exact and fits the diagonal anew.
_REFIT = 50


class Calibration(NamedTuple):
    """The diagonal that "calibrated" or "fitted" keeps in one row of a layer's buffers, and what may change it.

    Attributes:
        diagonal: (S,), changed in place.
        updates: how many training backward passes it has seen.
        training: whether this backward pass counts.
        fits: "fitted" rather than "calibrated".
    """

    diagonal: Tensor
    updates: Tensor
    training: bool
    fits: bool

    @property
    def due(self) -> bool:
        """Whether this backward pass is to be exact, and to end in ``fit``."""
        return self.fits and self.training and int(self.updates) % _REFIT == 0

    def after(self, jacobian: Callable[[], Tensor]) -> Tensor:
        """The diagonal after this backward pass has been counted; "calibrated" has taken in its mean of diag(J).

        The mean is cumulative over the first 100 passes, then exponential with weight 0.01.
        """
        if self.training:
            self.updates.add_(1)
            if not self.fits:
                weight = self.updates.to(self.diagonal.dtype).reciprocal().clamp(min=0.01)
                mean = jacobian().to(self.diagonal.dtype)
                # One batch that overflows must not spoil every gradient after it.
                self.diagonal.lerp_(torch.where(mean.isfinite(), mean, self.diagonal), weight)
        return self.diagonal

    def fit(self, delta: Sequence[Tensor], back: Sequence[Tensor]) -> None:
        """Set the diagonal to the a that minimises sum (back - a * delta)^2; zero for a unit without gradient.

        A pass whose gradients overflow fits nothing and is not counted.

        Args:
            delta: exact gradient of every state, (..., S) in parts along S.
            back: what each of them gives back to the state before it.
        """
        products, squares = (
            torch.cat(
                [(other.double() * d.double()).flatten(0, -2).sum(0) for other, d in zip(side, delta, strict=True)]
            )
            for side in (back, delta)
        )
        if not bool((products + squares).isfinite().all()):
            return  # a loss scaled too high, as a GradScaler's first ones: the next pass is exact instead
        self.updates.add_(1)
        self.diagonal.copy_(torch.where(squares > 0, products / squares, 0.0))


def recurrence(
    cell: Cell,
    feedback: Feedback,
    calibration: Calibration | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs and final state of one layer in one direction.

    Args:
        cell: from cells.py.
        feedback: the rule of the backward pass; not ``"bptt"``, and ``"fused-bptt"`` only where kernels take the input.
        calibration: the diagonal that ``"calibrated"`` and ``"fitted"`` read and update, else None.
        x: (T, B, I), or packed rows (N, I) with ``batch_sizes``.
        batch_sizes: rows of every step, int64 on the CPU, as in PackedSequence; None if x is dense.
        state: (h,) or (h, c), each (B, H).
        weights: w_ih (G*H, I), w_hh (G*H, H) and, if there are biases, b_ih and b_hh (G*H,).

    Returns:
        y, the shape of x with H in place of I, and the final state.

    Gradient: approximate, as the rule says; exact for k >= T.

    Raises:
        RuntimeError: no steps, as torch has it.

    Cost: through the fused kernels, five products over all rows forward and backward, one more per correction, and the
        gates kept in between. Through torch, where there is no kernel, torch's own layer without autograd, and a
        backward of one scan, two products to compute the gates anew, three to form the gradients, one per correction;
        kept in between: x, y and the state.
    """
    if not len(x):
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    y, *rest = _Recurrence.apply(  # type: ignore[no-untyped-call]
        cell, feedback, calibration, batch_sizes, len(state), x, *state, *weights
    )
    return y, tuple(rest[: len(state)])


class _Done(NamedTuple):
    """A forward pass that was done, and the gradients of its outputs: of y, then of every final state."""

    x: Tensor
    state: tuple[Tensor, ...]
    weights: list[Tensor]
    y: Tensor
    grads: tuple[Tensor, ...]
    batch_sizes: Tensor | None
    needs_x: bool


class _How(NamedTuple):
    """Everything besides tensors that a forward pass hands to its backward."""

    cell: Cell
    feedback: Feedback
    calibration: Calibration | None
    states: int
    fused: str | None
    tapes: int
    autocast: tuple[str, torch.dtype, bool]


NO_SECOND_DERIVATIVE = (
    "a feedback rule has no second derivative, and this backward pass was asked for one (create_graph=True, as for a "
    'gradient penalty): set feedback to "bptt"'
)

_NO_VMAP = (
    "torch.func.vmap cannot run through a recurrent layer, torch.nn's own included: put what it maps over into the "
    "batch, or loop over it"
)


class _Recurrence(torch.autograd.Function):
    """In torch.func's form: what the backward pass needs of the forward is an output of it, without a gradient."""

    @staticmethod
    def forward(
        cell: Cell,
        feedback: Feedback,
        calibration: Calibration | None,
        batch_sizes: Tensor | None,
        states: int,
        x: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        if fused_on(x, *rest) != "cpu":
            y, final = _forward(cell, x, rest[:states], list(rest[states:]), batch_sizes)
            return y, *final
        rounded = torch.is_autocast_enabled(x.device.type)
        y, final, tape = layer.forward(cell.name, *_wide(x, rest, states), batch_sizes, rounded=rounded)
        kept = tuple(part for part in tape if part is not None)
        if rounded and cell is not GRU:
            # What torch's layers return under autocast: its GRU alone stays in float32.
            return y.bfloat16(), *(s.bfloat16() for s in final), *kept, y
        return y, *final, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, feedback, calibration, batch_sizes, states, x, *rest = inputs
        kept = output[1 + states :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        fused = fused_on(x, *rest)
        autocast = autocast_now(x.device.type)
        narrowed = fused == "cpu" and autocast[2] and cell is not GRU
        y, tape = (kept[-1], kept[:-1]) if narrowed else (output[0], kept)
        ctx.how = _How(cell, feedback, calibration, states, fused, len(tape), autocast)
        ctx.save_for_backward(batch_sizes, x, y, *rest, *tape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, x, y, *rest = ctx.saved_tensors
        states = ctx.how.states
        known = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, (y, *rest[:states]), strict=False)]
        needs_x = ctx.needs_input_grad[5]
        # torch.compile takes no second derivative at all, and traces no function within a backward pass.
        run = _gradients if torch.compiler.is_compiling() else _Gradients.apply
        found = run(ctx.how, needs_x, batch_sizes, x, y, *known, *rest)
        return None, None, None, None, None, *found

    @staticmethod
    def vmap(*_: Any) -> None:
        raise RuntimeError(_NO_VMAP)


class _Gradients(torch.autograd.Function):
    """``_gradients`` as a function of its own: only what differentiates it again is refused, not torch.func.grad."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(*_: Any) -> None:  # as torch.func.jacrev asks for
        raise RuntimeError(_NO_VMAP)


# torch asks for a signature at every call, and finding it costs more than a small layer's kernel.
for _forward_of in (_Recurrence.forward, _Gradients.forward):
    setattr(_forward_of, "__signature__", inspect.signature(_forward_of))  # noqa: B010


def _gradients(
    how: _How, needs_x: bool, batch_sizes: Tensor | None, x: Tensor, y: Tensor, *tensors: Tensor
) -> tuple[Tensor | None, ...]:
    """Those of x, the state and the weights; ``tensors`` are those of the outputs, then what entered, then the tape."""
    grads, rest = tensors[: 1 + how.states], tensors[1 + how.states :]
    given, kept = rest[: len(rest) - how.tapes], rest[len(rest) - how.tapes :]
    fits = how.calibration is not None and bool(y.numel()) and how.calibration.due
    rule = (how.cell, how.feedback, how.calibration)
    if how.fused == "cpu" and not fits:
        wide_grads = tuple(g.to(y.dtype) for g in grads)
        tape = layer.Tape(*kept) if kept else layer.Tape(None, None)
        done = _Done(*_wide(x, given, how.states), y, wide_grads, batch_sizes, needs_x)
        found = _fused_backward(*rule, done, tape, rounded=how.autocast[2])
    else:
        done = _Done(x, given[: how.states], list(given[how.states :]), y, grads, batch_sizes, needs_x)
        through_triton = how.fused == "cuda" and not fits
        # The GPU kernels compute in the dtype of y, which is what autocast made it.
        device, dtype, enabled = how.autocast
        with torch.autocast(device, dtype, enabled and not through_triton):
            found = _triton_backward(*rule, done) if through_triton else _backward(*rule, done, fits)
    return None if found.x is None else found.x.to(x.dtype), *found.state, *found.weights


def autocast_now(device: str) -> tuple[str, torch.dtype, bool]:
    """The arguments of torch.autocast that say what is in force; a device without autocast, as meta, has none."""
    if not torch.amp.is_autocast_available(device):
        return "cpu", torch.bfloat16, False
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def fused_on(x: Tensor, *rest: Tensor) -> str | None:
    """The device whose fused kernels take a layer over this input, these states and weights; None if none do."""
    return x.device.type if why_not_fused(x, *rest) is None else None


def why_not_fused(x: Tensor, *rest: Tensor, exact: bool = False) -> str | None:
    """Why a layer over this input, these states and weights runs through torch; None if the fused kernels take it."""
    device = x.device.type
    dtypes = {t.dtype for t in rest}
    if device not in ("cpu", "cuda"):
        return f"there is no fused kernel for {device}"
    if device == "cuda":
        if exact:
            return "on a GPU exact BPTT is torch's own, through cuDNN"
    elif torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return f"under autocast the fused kernels take bfloat16, got {torch.get_autocast_dtype('cpu')}"
        if not {x.dtype, *dtypes} <= {torch.float32, torch.bfloat16} or rest[-1].dtype != torch.float32:
            return f"under autocast the fused kernels take float32 weights, got {sorted(map(str, dtypes))}"
    elif x.dtype not in (torch.float32, torch.float64) or dtypes != {x.dtype}:
        return f"the fused kernels take float32 or float64 throughout, got {sorted(map(str, {x.dtype, *dtypes}))}"
    reason: str | None = kernels.unavailable(device)
    return reason


def _wide(x: Tensor, rest: Sequence[Tensor], states: int) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """Input, states and weights in the dtype of the weights: under autocast, what enters may be bfloat16."""
    dtype = rest[-1].dtype
    return x.to(dtype), tuple(s.to(dtype) for s in rest[:states]), list(rest[states:])


def _fused_backward(
    cell: Cell, feedback: Feedback, calibration: Calibration | None, done: _Done, tape: layer.Tape, rounded: bool
) -> layer.Gradients:
    x, state, weights, y, grads, batch_sizes, needs_x = done

    def mean_jacobian() -> Tensor:
        return layer.mean_jacobian(cell.name, tape, y, state, weights[1], batch_sizes)

    D = _fused_diagonal(feedback, calibration, done, mean_jacobian)
    return layer.backward(
        cell.name, tape, x, y, state, weights, grads, D, feedback.corrections, batch_sizes, needs_x, rounded
    )


def _triton_backward(cell: Cell, feedback: Feedback, calibration: Calibration | None, done: _Done) -> layer.Gradients:
    from statefeed.backends.triton import layer as triton

    x, state, weights, y, grads, batch_sizes, needs_x = done
    tape = triton.tape(cell.name, x, y, state, weights, batch_sizes)
    D = _fused_diagonal(feedback, calibration, done, lambda: triton.mean_jacobian(cell.name, tape, y, weights[1]))
    return triton.backward(cell.name, tape, x, y, state, weights, grads, D, feedback.corrections, needs_x)


def _fused_diagonal(
    feedback: Feedback, calibration: Calibration | None, done: _Done, mean_jacobian: Callable[[], Tensor]
) -> Any:
    """D as the fused kernels take it: (S,), or the name of a rule that makes it row by row."""
    if calibration is not None:
        return calibration.after(mean_jacobian) if done.y.numel() else calibration.diagonal
    if feedback.exact:
        return "bptt"
    y = done.y
    D = feedback.stationary(len(done.state) * y.shape[-1], torch.promote_types(y.dtype, torch.float32), y.device)
    return feedback.diagonal if D is None else D


def _forward(
    cell: Cell, x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor], batch_sizes: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch's own layer; its gates are computed anew in the backward pass."""
    run = getattr(torch._VF, cell.name)
    hx: Any = [s[None] for s in state] if len(state) > 1 else state[0][None]
    biased = len(weights) > 2
    if batch_sizes is None:
        y, *final = run(x, hx, weights, biased, 1, 0.0, False, False, False)
    else:
        y, *final = run(x, batch_sizes, hx, weights, biased, 1, 0.0, False, False)
    return y, tuple(s[0] for s in final)


def _backward(
    cell: Cell, feedback: Feedback, calibration: Calibration | None, done: _Done, fits: bool
) -> layer.Gradients:
    """The gradient of every state, then local gradients over all rows, and the large products."""
    x, state, weights, y, grads, batch_sizes, needs_x = done
    wide = torch.float32 if y.dtype in (torch.bfloat16, torch.float16) else y.dtype
    time = _Time(batch_sizes)
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    h_before = time.before(y, state[0].to(y.dtype))

    def products() -> tuple[Tensor, Tensor]:
        return F.linear(x, w_ih, b_ih).to(wide), F.linear(h_before.to(w_hh.dtype), w_hh, b_hh).to(wide)

    def integrate(u: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        c0 = state[1].to(wide)
        c = time.rows(diagonal_scan(time.grid(u), time.grid(f), initial=c0))
        return time.before(c, c0), c

    step = cell.step(y.to(wide), products, integrate)
    h = h_before.to(wide)
    e = [time.at_end(torch.zeros_like(h), g.to(wide)) for g in grads[1:]]
    e[0] = e[0] + time.grid(grads[0].to(wide))

    if fits and calibration is not None:
        delta, back = _exact(cell, step, h, e, w_hh, time)
        calibration.fit(delta, back)
    else:
        D = _diagonals(cell, feedback, calibration, step, h, w_hh.to(wide))
        delta, back = _fed_back(cell, D, feedback.corrections, step, h, e, w_hh, time)

    d_input, d_hidden = cell.local(step, h, delta)
    same = d_hidden is d_input
    d_input = d_input.to(w_ih.dtype)
    d_hidden = d_input if same else d_hidden.to(w_hh.dtype)
    d_weights = [
        (_rows(d_input).T @ _rows(x)).to(w_ih.dtype),
        (_rows(d_hidden).T @ _rows(h_before).to(w_hh.dtype)).to(w_hh.dtype),
    ]
    if biases:
        d_weights += [_rows(d_input).sum(0), _rows(d_hidden).sum(0)]
    return layer.Gradients(
        (d_input @ w_ih).to(x.dtype) if needs_x else None,
        tuple(time.first(d).to(s.dtype) for d, s in zip(back, state, strict=True)),
        d_weights,
    )


def _fed_back(
    cell: Cell,
    D: tuple[Tensor, ...],
    corrections: int,
    step: NamedTuple,
    h: Tensor,
    e: list[Tensor],
    w_hh: Tensor,
    time: _Time,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The gradient of every state under the diagonal and its corrections, and what each gives back, as rows."""

    def scanned(residual: list[Tensor] | None) -> tuple[Tensor, ...]:
        """h first: what c is fed includes what reaches it through h."""
        delta: tuple[Tensor, ...] = ()
        for s, fed in enumerate(e):
            if s and cell.emit is not None:
                fed = fed + time.grid(cell.emit(step, delta[0]))
            if residual is not None:
                fed = fed + time.later(time.grid(residual[s]))
            a = D[s] if D[s].dim() == 1 else time.later(time.grid(D[s]))
            delta = (*delta, time.rows(diagonal_scan(fed, a, reverse=True)))
        return delta

    residual = None
    direct = cell.direct(step)
    delta = scanned(None)
    for _ in range(corrections):
        # (J - D)^T delta of the round before: the direct path less the feedback, then the dense part.
        _, d_hidden = cell.local(step, h, delta)
        residual = [_direct_less(p, d, g) for p, d, g in zip(direct, D, delta, strict=True)]
        residual[0] = residual[0] + (d_hidden.to(w_hh.dtype) @ w_hh).to(h.dtype)
        delta = scanned(residual)
    back = tuple(d * g for d, g in zip(D, delta, strict=True))
    if residual is not None:
        back = tuple(b + r for b, r in zip(back, residual, strict=True))
    return delta, back


def _exact(
    cell: Cell, step: Any, h: Tensor, e: list[Tensor], w_hh: Tensor, time: _Time
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """BPTT, one step after the other: the exact gradient of every state, and what each gives back, as rows."""
    parts = [time.steps(part) for part in (h, *step)]
    carry = [torch.zeros_like(grid[-1]) for grid in e]
    deltas, backs = [], []
    for t in reversed(range(len(e[0]))):
        before, *rest = (part[t] for part in parts)
        now = type(step)(*rest)
        delta: tuple[Tensor, ...] = ()
        for s, grid in enumerate(e):
            reached = grid[t, : len(before)] + carry[s][: len(before)]
            if s and cell.emit is not None:
                reached = reached + cell.emit(now, delta[0])
            delta = (*delta, reached)
        _, d_hidden = cell.local(now, before, delta)
        back = [torch.zeros_like(d) if p is None else p * d for p, d in zip(cell.direct(now), delta, strict=True)]
        back[0] = back[0] + (d_hidden.to(w_hh.dtype) @ w_hh).to(h.dtype)
        for kept, given in zip(carry, back, strict=True):
            kept[: len(before)] = given
        deltas.append(delta)
        backs.append(back)
    joined = (tuple(time.joined(list(part)[::-1]) for part in zip(*side, strict=True)) for side in (deltas, backs))
    delta, given_back = joined
    return delta, given_back


def _diagonals(
    cell: Cell, feedback: Feedback, calibration: Calibration | None, step: NamedTuple, h: Tensor, w_hh: Tensor
) -> tuple[Tensor, ...]:
    """D of every state: (H,) if stationary, else one row per step."""
    states, H = 1 if cell.emit is None else 2, h.shape[-1]
    if feedback.diagonal == "gate":
        return tuple(h.new_zeros(H) if p is None else p for p in cell.direct(step))
    if feedback.diagonal == "jacobian":
        return cell.jacobian(step, h, w_hh)
    if calibration is None:
        D = feedback.stationary(states * H, h.dtype, h.device)
        assert D is not None
    else:
        D = calibration.diagonal
        if h.numel():
            D = calibration.after(lambda: torch.cat([_rows(j).mean(0) for j in cell.jacobian(step, h, w_hh)]))
    return tuple(torch.split(D.to(h.dtype), H))


def _direct_less(direct: Tensor | None, D: Tensor, delta: Tensor) -> Tensor:
    return -D * delta if direct is None else (direct - D) * delta


class _Time(NamedTuple):
    """How rows lie in time: dense (T, B, .), or packed (N, .) with ``batch_sizes`` rows a step."""

    batch_sizes: Tensor | None

    def grid(self, rows: Tensor) -> Tensor:
        """(T, B, .), zero behind the end of a sequence."""
        if self.batch_sizes is None:
            return rows
        padded: Tensor = torch._VF._pad_packed_sequence(rows, self.batch_sizes, False, 0.0, -1)[0]
        return padded

    def rows(self, grid: Tensor) -> Tensor:
        """The inverse of ``grid``."""
        if self.batch_sizes is None:
            return grid
        packed: Tensor = torch._VF._pack_padded_sequence(grid, self._lengths(), False)[0]
        return packed

    def steps(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of every step."""
        return rows.unbind() if self.batch_sizes is None else torch.split(rows, self.batch_sizes.tolist())

    def joined(self, steps: list[Tensor]) -> Tensor:
        """The inverse of ``steps``."""
        return torch.stack(steps) if self.batch_sizes is None else torch.cat(steps)

    def before(self, rows: Tensor, initial: Tensor) -> Tensor:
        """The rows one step earlier, ``initial`` before the first."""
        return self.rows(torch.cat([initial[None], self.grid(rows)[:-1]]))

    def later(self, grid: Tensor) -> Tensor:
        """The grid one step later, zero behind the last."""
        return torch.cat([grid[1:], torch.zeros_like(grid[:1])])

    def first(self, rows: Tensor) -> Tensor:
        """The rows of the first step, (B, .)."""
        return rows[0] if self.batch_sizes is None else rows[: int(self.batch_sizes[0])]

    def at_end(self, rows: Tensor, final: Tensor) -> Tensor:
        """A grid of zeros with ``final`` (B, .) at the last step of every sequence."""
        grid = self.grid(rows)
        if self.batch_sizes is None:
            grid[-1] = final
        else:
            grid[self._lengths() - 1, torch.arange(len(final))] = final
        return grid

    def _lengths(self) -> Tensor:
        assert self.batch_sizes is not None
        steps = torch.arange(int(self.batch_sizes[0]))
        return (self.batch_sizes[:, None] > steps).sum(0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
