"""Stationary diagonals that are learned in training: the mean of diag(J), and a least-squares fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statefeed.feedback.protocol import Learned, LearnedState

# Minimum weight of a new mean: the first 100 passes have equal weights.
_WEIGHT = 0.01
# Under "fitted", number of training backward passes from one exact pass to the next.
_REFIT = 50


@dataclass(frozen=True)
class Calibrated(Learned):
    """The running mean of diag(J[t]): cumulative over the first 100 passes, then exponential with weight 0.01."""

    def observe(self, state: LearnedState, mean_jacobian: Callable[[], Tensor]) -> Tensor:
        if state.training:
            mean = mean_jacobian().to(state.diagonal.dtype)
            # Neither use nor count a batch whose mean overflows: a NaN would persist in the average.
            finite = mean.isfinite().all()
            state.updates.add_(finite)
            weight = state.updates.clamp(min=1).to(state.diagonal.dtype).reciprocal().clamp(min=_WEIGHT)
            state.diagonal.lerp_(torch.where(finite, mean, state.diagonal), weight)
        return state.diagonal

    def __str__(self) -> str:
        return "calibrated"


@dataclass(frozen=True)
class Fitted(Learned):
    """The a that minimizes sum (grad_prev - a * delta)^2 over an exact backward pass, taken every 50 passes."""

    takes_exact_passes = True

    def wants_exact(self, state: LearnedState) -> bool:
        return state.training and int(state.updates) % _REFIT == 0

    def observe(self, state: LearnedState, mean_jacobian: Callable[[], Tensor]) -> Tensor:
        if state.training:
            state.updates.add_(1)
        return state.diagonal

    def fit(self, state: LearnedState, delta: Sequence[Tensor], grad_prev: Sequence[Tensor]) -> None:
        """Fit the diagonal; zero for a unit without gradient. A pass whose gradients overflow is not counted."""
        products, squares = (
            torch.cat(
                [(other.double() * d.double()).flatten(0, -2).sum(0) for other, d in zip(side, delta, strict=True)]
            )
            for side in (grad_prev, delta)
        )
        if not bool((products + squares).isfinite().all()):
            return  # the loss scale is too high, as in the first steps of a GradScaler: the next pass is exact instead
        state.updates.add_(1)
        state.diagonal.copy_(torch.where(squares > 0, products / squares, 0.0))

    def __str__(self) -> str:
        return "fitted"
