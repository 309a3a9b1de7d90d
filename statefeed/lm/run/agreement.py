"""Agreement of the gradient under a rule with exact backpropagation through time, on one fixed batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import statefeed as sf


@dataclass(frozen=True)
class Agreement:
    """Comparison of the gradient under the current rule with the exact one, over all parameters concatenated.

    Args:
        loss: nats per token of the batch.
        cosine: cosine of the angle between the two gradients.
        norm_ratio: norm under the rule divided by the exact norm.
        seconds: duration of the measurement.
    """

    loss: float
    cosine: float
    norm_ratio: float
    seconds: float


def agreement(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any) -> Agreement | None:
    """Compare the two gradients; the model, its gradients and the random generators are restored.

    Args:
        model: in any mode.
        loss_fn: (model, batch) -> mean loss.
        batch: the same batch in every call, so that results differ by the model only.

    Returns:
        The comparison; None if no layer has an approximate rule.
    """
    layers = [module for module in model.modules() if isinstance(module, sf.FeedbackLayer)]
    if all(layer.feedback.exact for layer in layers):
        return None
    started = time.perf_counter()
    losses = []

    def noted(model: Any, batch: Any) -> Tensor:
        loss = loss_fn(model, batch)
        losses.append(loss.item())
        return loss

    total = sf.alignment(model, noted, batch, lags=0).total
    return Agreement(losses[0], total.cosine, total.norm_ratio, time.perf_counter() - started)
