"""Host time of one backward pass: the time in Python, with kernel launches disabled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from statefeed.backends.triton import operators as _operators  # noqa: F401
from statefeed.backends.triton import reverse
from statefeed.backends.triton.cells import CELLS


@contextmanager
def without_launches() -> Iterator[None]:
    """Disable kernel launches, for timing Python and for tests of the other calls of a pass."""
    kind: Any = type(reverse.run)
    before = kind.run
    kind.run = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        kind.run = before


def recomputed(
    cell: str, x: Tensor, y: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, ...]:
    """What the backward operator reads: results of the operator, zeros of a cell whose gates PyTorch recomputes.

    Args:
        cell, x, y, state, weights: as for ``recompute``.
        rest: the other arguments of ``recompute``.
    """
    if not CELLS[cell].from_states:
        found: tuple[Tensor, ...] = torch.ops.statefeed.triton_recompute(cell, x, y, state, weights, *rest)
        return found
    gates = torch.zeros((len(x), len(weights[0])), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.zeros_like(y), gates, torch.zeros_like(gates)


def backward_pass(cell: str, rule: str, device: str | torch.device = "cpu") -> Callable[[], None]:
    """A function that recomputes the gates of a tiny layer and runs its backward pass under a rule.

    Args:
        cell: name in the table of cells.
        rule: ``"stationary"``, ``"per_row"``, ``"direct"`` or ``"jacobian"``.
        device: of the tensors.
    """
    T, B, H, this = 4, 2, 8, CELLS[cell]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    P = H // 2 if this.projects else H
    x, y, e = zeros(T * B, H), zeros(T * B, P), zeros(T * B, P)
    state = [zeros(B, P), *(zeros(B, H) for _ in range(this.states - 1))]
    weights = [zeros(this.gates * H, *columns) for columns in ((H,), (P,), (), ())]
    weights += [zeros(P, H)] if this.projects else []
    S = P + (this.states - 1) * H
    D = {"stationary": zeros(S), "per_row": zeros(T * B, S)}.get(rule)
    operators = torch.ops.statefeed

    def run() -> None:
        saved = recomputed(cell, x, y, state, weights, None, False, "tf32")
        operators.triton_backward(
            cell, rule, *saved, x, y, state, weights, [e, *state], D, None, 0, False, True, "tf32"
        )  # fmt: skip

    return run


def microseconds(cell: str, rule: str, repeats: int = 200) -> float:
    """The shortest time of one backward pass in Python, on tensors so small that arithmetic is negligible."""
    run, least = backward_pass(cell, rule), float("inf")
    with without_launches(), torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            least = min(least, time.perf_counter() - start)
    return 1e6 * least
