"""How the gradient under a rule relates to the exact one, on a user's own model and batch: whole, by part, by lag."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from statefeed.custom import Recurrent
from statefeed.feedback import Feedback, Learned
from statefeed.mixin import FeedbackLayer

# Rows of the batch that show how credit decays with the lag: enough for a curve, little beside the whole batch.
_ROWS = 4


@dataclass(frozen=True)
class Agreement:
    """How one gradient compares with the exact one.

    Attributes:
        cosine: of the angle between the two, 1 where they point the same way; NaN where one of them is zero.
        norm_ratio: norm under the rule over the exact norm; NaN where the exact gradient is zero.
        sign_agreement: share of the entries with a nonzero exact gradient whose sign is right; NaN where there is none.
    """

    cosine: float
    norm_ratio: float
    sign_agreement: float


@dataclass(frozen=True)
class Lags:
    """How far back one layer assigns credit: one number for every lag k = 0, 1, ...

    ``g[k] = d <v, y[T-1]> / d x[T-1-k]``, x and y being the layer's input and output and v a random normal vector: the
    gradient that the last output sends to the input k steps before it, through every state between. The state before
    the first lag measured is zero.

    Attributes:
        exact: norm of g[k] under BPTT.
        rule: norm of g[k] under the layer's rule.
        agreement: of the two.
    """

    exact: tuple[float, ...]
    rule: tuple[float, ...]
    agreement: tuple[Agreement, ...]


@dataclass(frozen=True)
class Alignment:
    """The result of ``alignment``.

    Attributes:
        total: over all parameters joined.
        parameters: by parameter name, those that require grad and that the loss reaches.
        layers: by module name, over the parameters that a statefeed layer owns, joined.
        lags: by module name, how credit decays with the time lag through that layer.
    """

    total: Agreement
    parameters: dict[str, Agreement]
    layers: dict[str, Agreement]
    lags: dict[str, Lags]

    def numbers(self) -> dict[str, float]:
        """What a logger takes: ``alignment/cosine`` and its like in total, ``alignment/LAYER/cosine`` per layer."""
        parts = {"alignment": self.total, **{f"alignment/{name or 'model'}": at for name, at in self.layers.items()}}
        return {f"{place}/{what}": value for place, at in parts.items() for what, value in asdict(at).items()}


def alignment(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, lags: int = 64) -> Alignment:
    """Cosine, norm ratio and sign agreement between the gradient under the current rules and exact BPTT.

    ``cos(g, g*) = <g, g*> / (|g| |g*|)``, ``|g| / |g*|`` and the share of entries with ``sign(g) = sign(g*)``, g* being
    the gradient with every statefeed layer of the model set to ``"torch"``. Both passes draw the same random numbers,
    so that dropout masks are equal; the model is as it was afterwards: rules, ``.grad``, buffers and generators.

    A layer under ``"fitted"`` is measured under the diagonal that it has by now, not by one of its exact passes.

    The lags are measured on every layer alone, with the input of its first call (its longest sequences if they are
    packed or have ``lengths``; ``resets`` are left out), on the forward direction's half of the last output if it has
    two.

    Args:
        model: any module that holds statefeed layers.
        loss_fn: (model, batch) -> scalar loss.
        batch: handed to ``loss_fn`` as it is.
        lags: how many time lags to measure, on as many last steps of a layer's input; 0 for none.

    Returns:
        ``Alignment``: in total, per parameter, per layer, and per layer and lag.

    Gradient: none; it measures gradients and leaves ``.grad`` alone.

    Raises:
        ValueError: a model without a statefeed layer or without a parameter that requires grad, or negative ``lags``.

    Cost: one forward and backward pass under the rules and one under torch's own BPTT. For the lags the recurrent
        layers alone run once more in both ways, over min(lags, T) steps of min(4, B) rows: next to nothing beside a
        batch of many rows, but as much again for one of four rows or fewer and no more steps than ``lags``.

    Example:
        >>> import torch
        >>> import statefeed as sf
        >>> layer = sf.GRU(2, 4, feedback="gate+9")
        >>> result = alignment(layer, lambda model, x: model(x)[0].square().sum(), torch.ones(5, 1, 2))
        >>> round(result.total.cosine, 3), round(result.total.sign_agreement, 3)
        (1.0, 1.0)
        >>> [round(at.norm_ratio, 3) for at in result.lags[""].agreement]
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if lags < 0:
        raise ValueError(f"lags must be 0 or more, got {lags}")
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, FeedbackLayer)}
    if not layers:
        raise ValueError("alignment needs a model with a statefeed RNN, GRU, LSTM or Recurrent in it, got one without")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("alignment needs a parameter that requires grad, got a model without one")

    with _untouched(model), _inputs(layers, lags) as inputs:
        _freeze(layers.values())
        ours = _gradients(model, loss_fn, batch, parameters)
    with _untouched(model), ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.exact_rule())
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
        total=over(reached),
        parameters={name: over([name]) for name in reached},
        layers={name: over(group) for name, group in owned.items() if group},
        lags={name: _lags(layers[name], x) for name, x in inputs.items()},
    )


class Monitor:
    """Alignment on one batch every so many steps, in any training loop.

    Args:
        loss_fn: (model, batch) -> scalar loss, as for ``alignment``.
        batch: always the same one, so that what changes is the model.
        every: steps from one measurement to the next, the first at step 0.
        lags: as for ``alignment``; credit by lag is left in ``history``.

    Attributes:
        history: (step, ``Alignment``) of every measurement.

    Raises:
        ValueError: ``every`` below 1.

    Cost: that of ``alignment`` at every measurement, none in between.

    Example:
        >>> import torch
        >>> import statefeed as sf
        >>> layer = sf.GRU(2, 4, feedback="gate+9")
        >>> monitor = Monitor(lambda model, x: model(x)[0].square().sum(), torch.ones(5, 1, 2), every=100)
        >>> for step in range(101):
        ...     numbers = monitor(layer, step)  # hand them to a logger
        ...     # one training step
        >>> [step for step, _ in monitor.history], round(numbers["alignment/cosine"], 3)
        ([0, 100], 1.0)
    """

    def __init__(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, every: int = 500, lags: int = 0
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 step or more, got {every}")
        self.loss_fn, self.batch, self.every, self.lags = loss_fn, batch, every, lags
        self.history: list[tuple[int, Alignment]] = []

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """The numbers to log at a step; none between measurements, nor where every layer's rule is exact.

        Args:
            model: as for ``alignment``; it is left as it was.
            step: of the training, counted from 0.
        """
        rules = [m.feedback for m in model.modules() if isinstance(m, FeedbackLayer)]
        if step % self.every or (rules and all(rule.exact for rule in rules)):
            return {}
        self.history.append((step, alignment(model, self.loss_fn, self.batch, self.lags)))
        return self.history[-1][1].numbers()


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
    right = sum(int(((g.sign() == h.sign()) & (h != 0)).sum()) for g, h in pairs)
    signed = sum(int((h != 0).sum()) for _, h in pairs)
    ours_norm, exact_norm = (sum(float(v @ v) for v in side) ** 0.5 for side in zip(*pairs, strict=True))
    nan = float("nan")
    return Agreement(
        dot / (ours_norm * exact_norm) if ours_norm and exact_norm else nan,
        ours_norm / exact_norm if exact_norm else nan,
        right / signed if signed else nan,
    )


@contextmanager
def _inputs(layers: dict[str, Any], lags: int) -> Iterator[dict[str, Tensor]]:
    """Collects the input of every layer's first call, its last steps and some rows, (lags, rows, I)."""
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
        if lags and name not in inputs and x.is_floating_point():
            inputs[name] = x[-lags:, :_ROWS].detach()

    hooks = [
        layer.register_forward_pre_hook(lambda m, a, k, name=name: collect(name, m, a, k), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _freeze(layers: Iterable[Any]) -> None:
    """Set the rule of every layer whose passes are sometimes exact to the diagonal that it has learned."""
    for layer in layers:
        diagonal = layer.feedback.diagonal
        if isinstance(diagonal, Learned) and diagonal.takes_exact_passes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that corrections around a fixed diagonal near 1 may diverge
                layer.feedback = Feedback(layer.diagonal, layer.feedback.corrections)


def _lags(layer: Any, x: Tensor) -> Lags:
    with _untouched(layer):
        _freeze([layer])
        rule = _by_lag(layer, x)
    with _untouched(layer), layer.exact_rule():
        exact = _by_lag(layer, x)
    return Lags(
        tuple(exact.flatten(1).norm(dim=1).tolist()),
        tuple(rule.flatten(1).norm(dim=1).tolist()),
        tuple(_agreement([g], [h]) for g, h in zip(rule, exact, strict=True)),
    )


def _by_lag(layer: Any, x: Tensor) -> Tensor:
    """What the last output sends back to the input, (T, rows, I), lag 0 first."""
    x = x.to(next(layer.parameters()).dtype, copy=True).requires_grad_()
    with torch.enable_grad():
        y, _ = layer.forward(x.transpose(0, 1) if layer.batch_first else x)
        last = y[:, -1] if layer.batch_first else y[-1]
        if getattr(layer, "bidirectional", False):
            last = last[:, : layer.hidden_size]
        sent = (last * torch.randn_like(last)).sum()
    (grad,) = torch.autograd.grad(sent, x)
    return grad.flip(0).double().cpu()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put rules, buffers and random generators back as they were."""
    rules = [(m, m.feedback) for m in model.modules() if isinstance(m, FeedbackLayer)]
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
