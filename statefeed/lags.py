"""Credit assignment of a layer by time lag, under its rule and under BPTT."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from statefeed.agreement import Agreement, agreement_of
from statefeed.custom import Recurrent
from statefeed.feedback import Feedback, Learned
from statefeed.snapshot import untouched
from statefeed.stack import RecurrentStack

# Number of rows of the batch for the measurement by lag: enough for a curve, and cheap.
_ROWS = 4


@dataclass(frozen=True)
class Lags:
    """Credit assignment of one layer by time lag, one value for every lag k = 0, 1, ...

    ``g[k] = d <v, y[T-1]> / d x[T-1-k]``, where x and y are the input and output of the layer and v is a random normal
    vector: the gradient of the last output with respect to the input k steps earlier, through all states in between.
    The state before the first measured step is zero.

    Attributes:
        exact: norm of g[k] under BPTT.
        rule: norm of g[k] under the layer's rule.
        agreement: comparison of the two gradients.
    """

    exact: tuple[float, ...]
    rule: tuple[float, ...]
    agreement: tuple[Agreement, ...]


@contextmanager
def first_inputs(layers: dict[str, Any], lags: int) -> Iterator[dict[str, Tensor]]:
    """Context that collects the input of every layer's first call: its last steps and a few rows, (lags, rows, I)."""
    inputs: dict[str, Tensor] = {}

    def collect(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, lengths = args[0] if args else kwargs["x" if isinstance(layer, Recurrent) else "input"], None
        if isinstance(x, PackedSequence):
            x, lengths = pad_packed_sequence(x)
        else:
            x = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if layer.batch_first else x
            lengths = kwargs.get("lengths")
        if lengths is not None:
            longest = int(lengths.max())
            x = x[:longest, lengths.to(x.device) == longest]
        if lags and name not in inputs and (x.is_floating_point() or x.is_complex()):
            inputs[name] = x[-lags:, :_ROWS].detach()

    # The arguments and results of a subclass that overrides forward are unknown.
    hooks = [
        layer.register_forward_pre_hook(lambda m, a, k, name=name: collect(name, m, a, k), with_kwargs=True)
        for name, layer in layers.items()
        if type(layer).forward in (RecurrentStack.forward, Recurrent.forward)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def freeze_learned(layers: Iterable[Any]) -> None:
    """Set the rule of every layer with occasional exact passes to its learned diagonal."""
    for layer in layers:
        diagonal = layer.feedback.diagonal
        if isinstance(diagonal, Learned) and diagonal.takes_exact_passes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # corrections around a fixed diagonal near 1 may diverge
                layer.feedback = Feedback(layer.diagonal, layer.feedback.corrections)


def lags_of(layer: Any, x: Tensor) -> Lags:
    """Credit assignment of a layer under its rule and under BPTT, on one input (T, rows, I)."""
    with untouched(layer):
        freeze_learned([layer])
        rule = _by_lag(layer, x)
    with untouched(layer), layer.exact_rule():
        exact = _by_lag(layer, x)
    return Lags(
        tuple(exact.flatten(1).norm(dim=1).tolist()),
        tuple(rule.flatten(1).norm(dim=1).tolist()),
        tuple(agreement_of([g], [h]) for g, h in zip(rule, exact, strict=True)),
    )


def _by_lag(layer: Any, x: Tensor) -> Tensor:
    """Gradient of the last output with respect to the input, (T, rows, I), lag 0 first."""
    weight = next(layer.parameters(), x)
    x = x.to(weight.dtype, copy=True).requires_grad_()
    with torch.enable_grad():
        y, _ = layer.forward(x.transpose(0, 1) if layer.batch_first else x)
        last = y[:, -1] if layer.batch_first else y[-1]
        if getattr(layer, "bidirectional", False):
            last = last[:, : last.shape[1] // 2]
        projection = (last * torch.randn_like(last)).sum()
    (grad,) = torch.autograd.grad(projection.real if projection.is_complex() else projection, x)
    return grad.flip(0).to(torch.promote_types(grad.dtype, torch.float64)).cpu()
