"""How the gradient under a rule relates to the exact one: cosine and norm ratio on a user's own model and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statefeed.modules import GRU, LSTM, RNN


@dataclass(frozen=True)
class Agreement:
    """How one gradient compares with the exact one.

    Attributes:
        cosine: of the angle between the two, 1 where they point the same way; NaN where one of them is zero.
        norm_ratio: norm under the rule over the exact norm; NaN where the exact gradient is zero.
    """

    cosine: float
    norm_ratio: float


@dataclass(frozen=True)
class Alignment:
    """The result of ``alignment``.

    Attributes:
        total: over all parameters joined.
        parameters: by parameter name, those that require grad and that the loss reaches.
        layers: by module name, over the parameters that a statefeed layer owns, joined.
    """

    total: Agreement
    parameters: dict[str, Agreement]
    layers: dict[str, Agreement]


def alignment(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> Alignment:
    """Cosine and norm ratio between the gradient under the current rules and exact BPTT.

    ``cos(g, g*) = <g, g*> / (|g| |g*|)`` and ``|g| / |g*|``, g* being the gradient with every statefeed layer of the
    model set to ``"bptt"``. Both passes draw the same random numbers, so dropout masks are equal; the model is as it
    was afterwards: rules, ``.grad``, buffers and generators.

    Args:
        model: any module that holds statefeed layers.
        loss_fn: (model, batch) -> scalar loss.
        batch: handed to ``loss_fn`` as it is.

    Returns:
        ``Alignment``: in total, per parameter and per layer.

    Gradient: none; it measures gradients and leaves ``.grad`` alone.

    Raises:
        ValueError: a model without a statefeed layer or without a parameter that requires grad.

    Cost: one forward and backward pass under the rules, one under torch's own BPTT.

    Example:
        >>> layer = GRU(2, 4, feedback="gate+9")
        >>> result = alignment(layer, lambda model, x: model(x)[0].square().sum(), torch.ones(5, 1, 2))
        >>> round(result.total.cosine, 3)
        1.0
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (RNN, GRU, LSTM))}
    if not layers:
        raise ValueError("alignment needs a model with a statefeed RNN, GRU or LSTM in it, got one without")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("alignment needs a parameter that requires grad, got a model without one")

    with _untouched(model):
        ours = _gradients(model, loss_fn, batch, parameters)
    with _untouched(model):
        for layer in layers.values():
            layer.feedback = "bptt"
        exact = _gradients(model, loss_fn, batch, parameters)

    reached = [name for name, g in exact.items() if g is not None and ours[name] is not None]
    names = {id(p): name for name, p in parameters.items()}
    owned = {
        layer_name: [n for n in (names.get(id(p)) for p in layer.parameters()) if n in reached]
        for layer_name, layer in layers.items()
    }

    def over(group: list[str]) -> Agreement:
        return _agreement([ours[name] for name in group], [exact[name] for name in group])

    return Alignment(
        over(reached), {name: over([name]) for name in reached}, {k: over(v) for k, v in owned.items() if v}
    )


def _gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor | None]:
    with torch.enable_grad():
        loss = loss_fn(model, batch)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


def _agreement(ours: list[Tensor | None], exact: list[Tensor | None]) -> Agreement:
    pairs = [
        (g.double().flatten(), h.double().flatten())
        for g, h in zip(ours, exact, strict=True)
        if g is not None and h is not None
    ]
    dot = sum(float(g @ h) for g, h in pairs)
    ours_norm, exact_norm = (sum(float(v @ v) for v in side) ** 0.5 for side in zip(*pairs, strict=True))
    nan = float("nan")
    return Agreement(
        dot / (ours_norm * exact_norm) if ours_norm and exact_norm else nan,
        ours_norm / exact_norm if exact_norm else nan,
    )


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put rules, buffers and random generators back as they were."""
    rules = [(m, m.feedback) for m in model.modules() if isinstance(m, (RNN, GRU, LSTM))]
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for layer, rule in rules:
                layer.feedback = rule
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
