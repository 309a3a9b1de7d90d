"""Forward pass of one layer in parallel over time: quasi-Newton iteration with a diagonal Jacobian, solved by a scan.

    h <- scan_D(f(h') - D h')            h' = estimate of h before every step, f = one step of the cell, for all steps

D is the direct path (GRU: z; LSTM: f on c, 0 on h), or diag(J) for a cell without one. One iteration is one product
over all steps, elementwise operations and one scan. After k iterations the first k steps are exact. The number of
iterations depends on the dynamics more than on T. Quasi-DEER (arXiv 2407.19115) is the same iteration with diag(J).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.backends import BACKENDS, Forward, Problem
from statefeed.backends.protocol import forward_in_order
from statefeed.backends.triton.precision import forward_precision, matmul_precision
from statefeed.cells.protocol import Cell, State
from statefeed.layout import Layout
from statefeed.scan import diagonal_scan

# Number of iterations between two readings of the defect on a GPU, each of which synchronizes.
_CHECK_EVERY = 4
# Number of iterations without a decrease of the defect after which the iteration stops.
_GIVE_UP_AFTER = 16
# Multiples of the machine epsilon of the products: the smallest tolerance, and the largest defect that may be rounding
# error, which does not decrease; the first in float32 and float64, whose errors large preactivations amplify.
_FLOOR, _ROUNDING, _ROUNDING_LOW = 0.5, 32, 4

_UNSUPPORTED = (
    'not support forward_method "newton", which reads its progress from the device: set forward_method to '
    '"sequential", or leave out the layer'
)
NOT_COMPILED = f"torch.compile and torch.export do {_UNSUPPORTED}"


@dataclass(frozen=True)
class Newton:
    """Settings of a forward pass that is parallel over time, a value of ``layer.forward_method``.

    Every step satisfies ``|h[t] - f(h[t-1], x[t])| <= tolerance * (1 + |h[t]|)``. If the dynamics amplify errors, the
    error of the states is larger than this defect. Steps that do not converge run sequentially.

    Args:
        tolerance: largest defect of a step; at least half the machine epsilon of the products is used (6e-8 in float32,
            5e-4 in TF32, 4e-3 in bfloat16). A defect below 4 times that epsilon, or 32 times in float32 and float64,
            that no longer decreases is accepted as rounding error.
        max_iterations: number of iterations after which the remaining steps run sequentially.
        keep_states: whether the layer keeps h of every step in ``newton_states``, which can be given to a later call
            on the same batch as ``newton_guess``.

    Raises:
        ValueError: the tolerance is not positive and finite, or max_iterations is not a positive integer.

    Cost: per iteration one product over all T * B steps and one scan, see ``statefeed.newton.forward``.

    Example:
        >>> import torch, statefeed as sf
        >>> layer = sf.GRU(3, 5)
        >>> layer.forward_method = sf.Newton(tolerance=1e-6)
        >>> y, h = layer(torch.zeros(100, 2, 3))
        >>> layer.newton_iterations[0] < 20
        True
    """

    tolerance: float = 1e-4
    max_iterations: int = 100
    keep_states: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.tolerance, bool) or not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be a number above 0, got {self.tolerance!r}")
        if isinstance(self.max_iterations, bool) or not isinstance(self.max_iterations, int) or self.max_iterations < 1:
            raise ValueError(f"max_iterations must be a whole number above 0, got {self.max_iterations!r}")

    def __str__(self) -> str:
        return f"newton({self.tolerance:g})"


def as_forward_method(method: str | Newton) -> Newton | None:
    """Parse a forward method: ``"newton"``, ``"newton(tolerance)"`` or a ``Newton``; None for ``"sequential"``.

    Raises:
        TypeError: the method is neither a string nor a ``Newton``.
        ValueError: the string is not one of these.

    Example:
        >>> as_forward_method("newton(1e-3)")
        Newton(tolerance=0.001, max_iterations=100, keep_states=False)
    """
    if isinstance(method, Newton):
        return method
    expected = 'forward_method must be "sequential", "newton", "newton(tolerance)" or a statefeed.Newton'
    if not isinstance(method, str):
        raise TypeError(f"{expected}, got {method!r}")
    if method == "sequential":
        return None
    match = re.fullmatch(r"newton(?:\((.+)\))?", method)
    try:
        tolerance = float(match[1] or Newton.tolerance) if match else 0.0
    except ValueError:
        tolerance = 0.0
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"{expected}, got {method!r}")
    return Newton(tolerance)


def unsupported_cell(cell: Cell) -> str | None:
    """Why the iteration does not support a cell, in one sentence; None if it does."""
    if len(cell.states) > 1 and type(cell).newton_update is Cell.newton_update:
        parts = " and ".join(cell.states)
        return (
            f"the state of the cell {cell.name!r} has the parts {parts}, and it has no newton_update of its own that "
            'solves them: set forward_method to "sequential"'
        )
    return None


@dataclass
class Run:
    """Settings and statistics of one call of a module, with one entry per layer and direction.

    Attributes:
        settings: the settings of the module.
        guess: h of every step from which the iteration starts, as ``states``; None for zeros.
        iterations: number of iterations.
        sequential_steps: number of steps that ran sequentially.
        states: h of every step (N, H), if the settings say so.
    """

    settings: Newton
    guess: Sequence[Tensor] | None = None
    iterations: list[int] = field(default_factory=list)
    sequential_steps: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def starts(self, problems: Sequence[Problem]) -> list[Tensor | None]:
        """The estimates of h from which the directions of the next layer start, rows in the order of processing."""
        if self.guess is None:
            return [None] * len(problems)
        given = self.guess[len(self.iterations) :]
        rows = [g.detach().reshape(len(p.x), -1) for g, p in zip(given, problems, strict=False)]
        return [p.layout.reverse(r) if p.reverse else r for r, p in zip(rows, problems, strict=True)]


def check_guess(guess: Sequence[Tensor], expected: tuple[int, ...], count: int) -> None:
    """Raise unless the estimates have the shape of h of every layer and direction.

    Raises:
        ValueError: the number of tensors or a shape differs.
    """
    shapes = [tuple(g.shape) for g in guess]
    if shapes != [expected] * count:
        raise ValueError(
            f"newton_guess must have {count} tensors of shape {expected}, h of every step for every layer and "
            f"direction as in newton_states, got {shapes}"
        )


def forward(problems: Sequence[Problem], backend: str, run: Run) -> list[Forward]:
    """Run the forward pass of one layer with all directions; nothing is saved for the backward pass.

    Args:
        problems: one per direction.
        backend: key of ``BACKENDS``; this backend runs the steps that do not converge.
        run: settings, to which the statistics are added.

    Returns:
        One ``Forward`` per direction.

    Gradient: none.

    Raises:
        RuntimeError: called while a CUDA graph is captured.

    Cost: per iteration one product over all T * B steps, including padding, and one scan; on a GPU one synchronization
        every 4 iterations. Memory: (2 G + 6) * H values per step.
    """

    starts = iter(run.starts(problems))

    def one(problem: Problem, save: bool) -> Forward:
        return _forward(problem, backend, run, next(starts))

    if problems[0].x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a CUDA graph does {_UNSUPPORTED}")
    # float32 products on a GPU run in the precision of cuDNN's layers, as in the sequential forward pass.
    with torch.no_grad(), matmul_precision("") if problems[0].x.is_cuda else nullcontext():
        found = forward_in_order(one, problems, False)
    if run.settings.keep_states:
        run.states += [done.y for done in found]
    return found


def _forward(problem: Problem, backend: str, run: Run, start: Tensor | None) -> Forward:
    layout = problem.layout
    system = _System(problem, run.settings.tolerance)
    solved = system.solve(run.settings.max_iterations, None if start is None else layout.grid(start))
    run.iterations.append(solved.iterations)
    run.sequential_steps.append(layout.T - solved.steps)
    dtypes = _output_dtypes(problem, backend)
    rows = tuple(layout.rows(part).to(dtype) for part, dtype in zip(solved.states, dtypes, strict=True))
    initial = tuple(s.to(dtype) for s, dtype in zip(problem.state, dtypes, strict=True))
    if solved.steps == layout.T:
        return Forward(rows[0], tuple(layout.last(part, s) for part, s in zip(rows, initial, strict=True)))
    return _finish(problem, backend, solved.steps, rows, initial)


def _finish(problem: Problem, backend: str, steps: int, rows: State, initial: State) -> Forward:
    """Run the steps after the ``steps`` converged ones sequentially."""
    layout = problem.layout
    sizes = layout.batch_sizes
    done = steps * layout.B if sizes is None else int(sizes[:steps].sum())
    alive = layout.B if sizes is None else int(sizes[steps])
    before = Layout(steps, layout.B, None if sizes is None else sizes[:steps])
    rest = Layout(layout.T - steps, alive, None if sizes is None else sizes[steps:])
    ends = tuple(before.last(part[:done], s) for part, s in zip(rows, initial, strict=True))
    part = problem._replace(x=problem.x[done:], state=tuple(s[:alive] for s in ends), layout=rest)
    found = BACKENDS[backend].forward([part], False)[0]
    final = tuple(torch.cat([new.to(s.dtype), s[alive:]]) for new, s in zip(found.final, ends, strict=True))
    return Forward(torch.cat([rows[0][:done], found.y.to(rows[0].dtype)]), final)


class _Solved(NamedTuple):
    """States (T, B, width), of which the first ``steps`` steps have converged."""

    states: State
    steps: int
    iterations: int


class _System:
    """The equations h[t] = f(h[t-1], x[t]) of all steps of one direction, on a dense grid (T, B, .).

    Args:
        problem: a problem with rows in the order of processing.
        tolerance: largest defect relative to 1 + |h|.
    """

    def __init__(self, problem: Problem, tolerance: float) -> None:
        self.cell, layout = problem.cell, problem.layout
        weights = problem.named_weights
        w_ih, w_hh, w_hr = weights.w_ih, weights.w_hh, weights.w_hr
        self.product_dtype = _product_dtype(problem)
        self.dtype = torch.promote_types(self.product_dtype, torch.float32)
        self.T, self.B, self.H = layout.T, layout.B, len(w_hh) // self.cell.gates
        self.initial = tuple(s.to(self.dtype) for s in problem.state)
        self.w_hh = w_hh.to(self.dtype)
        self.w_hh_products = w_hh.to(self.product_dtype)
        self.w_hr = None if w_hr is None else w_hr.to(self.product_dtype)
        self.on_gpu = problem.x.is_cuda
        spacing = self._spacing()
        self.tolerance = max(tolerance, _FLOOR * spacing)
        self.rounding = spacing * (_ROUNDING if spacing < 1e-6 else _ROUNDING_LOW)
        self.valid = None
        if layout.batch_sizes is not None:
            steps = torch.arange(self.T, device="cpu")[:, None]
            self.valid = (steps < layout.lengths()).to(problem.x.device)[..., None]

        G, shared = self.cell.gates, self.cell.shared_gates
        x = layout.grid(problem.x.to(self.product_dtype)).flatten(0, 1)
        w_ih_gates = w_ih.to(self.product_dtype).view(G, self.H, -1).mT
        inputs = torch.bmm(x.expand(G, *x.shape), w_ih_gates).to(self.dtype)
        constant = inputs.new_zeros(G - shared, 1, self.H)
        if weights.b_ih is not None and weights.b_hh is not None:
            b_ih, b_hh = (b.to(self.dtype).view(G, 1, self.H) for b in (weights.b_ih, weights.b_hh))
            inputs += b_ih
            inputs[:shared] += b_hh[:shared]
            constant = b_hh[shared:]
        self.inputs = inputs[shared:].view(G - shared, self.T, self.B, self.H)
        # Addend of the product with h: inputs for a gate that takes their sum, otherwise the hidden bias.
        self.addend = inputs if shared == G else torch.cat([inputs[:shared], constant.expand(-1, inputs.shape[1], -1)])

    def _spacing(self) -> float:
        tf32 = self.on_gpu and self.product_dtype == torch.float32 and forward_precision() == "tf32"
        return 2.0**-10 if tf32 else torch.finfo(self.product_dtype).eps

    def solve(self, max_iterations: int, start: Tensor | None) -> _Solved:
        """Iterate from ``start``, (T, B, H) or zeros, until every step has converged or there is no progress."""
        shape = (self.T, self.B, self.initial[0].shape[1])
        h = self.initial[0].new_zeros(shape) if start is None else start.to(self.dtype)
        if not self.B:
            others = (s.new_zeros(self.T, self.B, s.shape[1]) for s in self.initial[1:])
            return _Solved((h, *others), self.T, 0)
        read: dict[int, float] = {}
        for k in range(1, max_iterations + 1):
            reads = k == max_iterations or not self.on_gpu or k % _CHECK_EVERY == 0
            states, defect = self.update(h, reads)
            if defect is not None:
                read[k] = float(defect.max())
                if read[k] <= self.tolerance or (read[k] <= self.rounding and _stalled(read, 2 * _CHECK_EVERY, 0.5)):
                    return _Solved((h, *states[1:]), self.T, k)
                if k == max_iterations or _stalled(read, _GIVE_UP_AFTER, 0.9):
                    above = (~(defect.amax((1, 2)) <= self.tolerance)).nonzero()
                    return _Solved((h, *states[1:]), int(above[0]), k)
            h = states[0]
        raise AssertionError("unreachable: the last iteration reads the defect")

    def update(self, h: Tensor, reads: bool) -> tuple[State, Tensor | None]:
        """The next states and, with ``reads``, the defect of ``h`` relative to 1 + |h|, (T, B, H)."""
        h_prev = torch.cat([self.initial[0][None], h[:-1]])
        defect: list[Tensor] = []

        def scan(part: int, a: Tensor | None, b: Tensor) -> Tensor:
            if not part and self.w_hr is not None:
                b = (b.to(self.product_dtype) @ self.w_hr.T).to(self.dtype)
            if reads and not part:
                stepped = b if a is None else torch.addcmul(b, a, h_prev)
                relative = (stepped - h).abs_().div_(h.abs().add_(1))
                defect.append(relative if self.valid is None else relative.where(self.valid, 0))
            return b if a is None else diagonal_scan(b, a, initial=self.initial[part])

        gates = self.preactivations(h_prev).view(self.cell.gates, self.T, self.B, self.H)
        states = self.cell.newton_update(gates, self.inputs, h_prev, self.w_hh, scan)
        return states, defect[0] if defect else None

    def preactivations(self, h_prev: Tensor) -> Tensor:
        """The argument ``gates`` of ``Cell.newton_update``, (G, T * B, H)."""
        rows = h_prev.flatten(0, 1).to(self.product_dtype)
        return self.cell.hidden_by_gate(self.addend, rows, self.w_hh_products)


def _stalled(read: dict[int, float], iterations: int, factor: float) -> bool:
    """Whether the last defect is not below ``factor`` times the defect ``iterations`` earlier; true for NaN."""
    last = max(read)
    earlier = [defect for k, defect in read.items() if k <= last - iterations]
    return bool(earlier) and not read[last] < factor * earlier[-1]


def _product_dtype(problem: Problem) -> torch.dtype:
    """The dtype of products: that of autocast, which does not cast float64, or of the weights."""
    dtype = problem.weights[0].dtype
    return dtype if problem.compute_dtype is None or dtype == torch.float64 else problem.compute_dtype


def _output_dtypes(problem: Problem, backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes of the parts of the state in the backend's own forward pass."""
    dtype = problem.weights[0].dtype
    if problem.compute_dtype is None or BACKENDS[backend].upcasts or dtype == torch.float64:
        return (dtype,) * len(problem.state)
    if problem.x.is_cuda and problem.cell.torch_forward is not None:
        return (problem.compute_dtype,) * len(problem.state)
    return problem.cell.autocast_dtypes(problem.compute_dtype, problem.state[-1].dtype, problem.layout.ragged)
