"""Comparison of the gradient under the rules of a model with the exact one: in total, by layer and by time lag."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statefeed.agreement import Agreement, agreement_of
from statefeed.lags import Lags, first_inputs, freeze_learned, lags_of
from statefeed.mixin import FeedbackLayer
from statefeed.model_argument import check_model
from statefeed.snapshot import untouched

# Largest relative difference of two losses that rounding can cause, also in bfloat16.
_SAME_LOSS = 0.05
_EXAMPLE = "lambda model, batch: %s(model(batch[0]), batch[1])"


@dataclass(frozen=True)
class Alignment:
    """The result of ``alignment``.

    Attributes:
        total: comparison over all parameters concatenated.
        parameters: comparison by parameter name, for parameters that require grad and have a gradient.
        layers: comparison by module name, over the concatenated parameters of each statefeed layer.
        lags: credit assignment by time lag, by module name.
    """

    total: Agreement
    parameters: dict[str, Agreement]
    layers: dict[str, Agreement]
    lags: dict[str, Lags]

    def __str__(self) -> str:
        rows = {"total": self.total, **{f"layer {name or 'itself'}": at for name, at in self.layers.items()}}
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {at}" for name, at in rows.items())

    def numbers(self) -> dict[str, float]:
        """The values for a logger by name.

        Returns:
            ``alignment/cosine`` etc. in total, ``alignment/LAYER/cosine`` etc. per layer.
        """
        parts = {"alignment": self.total, **{f"alignment/{name or 'model'}": at for name, at in self.layers.items()}}
        return {f"{prefix}/{metric}": value for prefix, at in parts.items() for metric, value in asdict(at).items()}


def alignment(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, lags: int = 64) -> Alignment:
    """Compare the gradient under the current rules with exact BPTT: cosine, norm ratio and sign agreement.

    ``cos(g, g*) = <g, g*> / (|g| |g*|)``, ``|g| / |g*|`` and the fraction of entries with ``sign(g) = sign(g*)``, where
    g* is the gradient with every statefeed layer of the model set to ``"torch"``. Both passes draw the same random
    numbers and start from the same hidden state, so that dropout masks are equal. A compiled model is run uncompiled.
    Rules, ``.grad``, buffers, hidden state in attributes and random generators are restored afterwards. If a gradient
    is not finite, its results are NaN.

    A layer under ``"fitted"`` is measured with its current diagonal, not with one of its exact passes.

    The lags are measured on each layer separately, with the input of its first call. For packed inputs and inputs with
    ``lengths`` only the longest sequences are used; ``resets`` are ignored. For a bidirectional layer, the forward half
    of the last output is used. A subclass that overrides ``forward`` has no lags.

    Args:
        model: any module that contains statefeed layers.
        loss_fn: (model, batch) -> scalar loss, as ``lambda model, batch: F.mse_loss(model(batch[0]), batch[1])``.
        batch: passed to ``loss_fn`` unchanged.
        lags: number of time lags to measure, on the last ``lags`` steps of the input of a layer; 0 for none.

    Returns:
        ``Alignment``: the comparison in total, per parameter, per layer, and per layer and lag.

    Gradient: none; ``.grad`` is not changed.

    Raises:
        TypeError: the first argument is not a module; ``loss_fn`` is no function, or one of outputs and targets; it
            returns no tensor.
        ValueError: the loss is not a scalar; the model has no statefeed layer that the gradient passes through, no
            parameter that requires grad and that the loss depends on, or sharded parameters; or ``lags`` is negative.

    Warns:
        UserWarning: the two passes have different losses, so that their gradients cannot be compared.

    Cost: one forward and backward pass under the rules and one under torch's own BPTT. The lags add two passes of the
        recurrent layers, over min(lags, T) steps of min(4, B) rows.

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
    check_model(model, "alignment(model, loss_fn, batch)")
    _check_loss_fn(loss_fn, batch, "alignment(model, loss_fn, batch)")
    if lags < 0:
        raise ValueError(f"lags must be 0 or more, got {lags}")
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, FeedbackLayer)}
    if not layers:
        raise ValueError(
            "alignment needs a model with a statefeed RNN, GRU, LSTM or Recurrent layer, got a model without one"
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("alignment needs a parameter that requires grad, got a model without one")
    sharded = _sharded(model)
    if sharded is not None:
        raise ValueError(f"alignment needs unsharded parameters, got {sharded}: measure a model that is not sharded")

    with untouched(model), first_inputs(layers, lags) as inputs, _eager():
        freeze_learned(layers.values())
        with _passed(layers.values()) as passed:
            loss, ours = _gradients(model, loss_fn, batch, parameters)
    with untouched(model), _eager(), ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.exact_rule())
        expected, exact = _gradients(model, loss_fn, batch, parameters)

    _warn_of_two_losses(loss, expected)
    reached = [name for name, g in exact.items() if g is not None and ours[name] is not None]
    if not reached:
        raise ValueError("alignment needs a loss that depends on a parameter, got one that reaches none of them")
    if not passed:
        raise ValueError(
            "alignment needs a loss whose gradient passes through a statefeed layer, got a loss without one: every "
            "layer's output is unused, detached or computed without autograd"
        )
    names = {id(p): name for name, p in parameters.items()}
    reached_by_layer = {
        layer_name: [n for n in (names.get(id(p)) for p in layer.parameters()) if n in reached]
        for layer_name, layer in layers.items()
    }

    def over(group: list[str]) -> Agreement:
        return agreement_of([ours[name] for name in group], [exact[name] for name in group])

    return Alignment(
        total=over(reached),
        parameters={name: over([name]) for name in reached},
        layers={name: over(group) for name, group in reached_by_layer.items() if group},
        lags={name: lags_of(layers[name], x) for name, x in inputs.items()},
    )


class Monitor:
    """Measures alignment on a fixed batch at regular steps of a training loop.

    Args:
        loss_fn: (model, batch) -> scalar loss, as for ``alignment``.
        batch: the batch of every measurement.
        every: number of steps between measurements; the first is at step 0.
        lags: as for ``alignment``; the results by lag are in ``history``.

    Attributes:
        history: (step, ``Alignment``) of every measurement.

    Gradient: none.

    Raises:
        TypeError: ``loss_fn`` is not a function.
        ValueError: ``every`` below 1.

    Cost: the cost of ``alignment`` at every measurement, none at other steps.

    Example:
        >>> import torch
        >>> import statefeed as sf
        >>> layer = sf.GRU(2, 4, feedback="gate+9")
        >>> monitor = Monitor(lambda model, x: model(x)[0].square().sum(), torch.ones(5, 1, 2), every=100)
        >>> for step in range(101):
        ...     numbers = monitor(layer, step)  # pass them to a logger
        ...     # one training step
        >>> [step for step, _ in monitor.history], round(numbers["alignment/cosine"], 3)
        ([0, 100], 1.0)
    """

    def __init__(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, every: int = 500, lags: int = 0
    ) -> None:
        _check_loss_fn(loss_fn, batch, "Monitor(loss_fn, batch), and the monitor with (model, step)")
        if every < 1:
            raise ValueError(f"every must be 1 step or more, got {every}")
        self.loss_fn, self.batch, self.every, self.lags = loss_fn, batch, every, lags
        self.history: list[tuple[int, Alignment]] = []

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure the alignment if it is due at this step.

        Args:
            model: as for ``alignment``; it is not changed.
            step: training step, counted from 0.

        Returns:
            The values to log; empty between measurements and if the rule of every layer is exact.
        """
        check_model(model, "the monitor with (model, step)")
        rules = [m.feedback for m in model.modules() if isinstance(m, FeedbackLayer)]
        if step % self.every or (rules and all(rule.exact for rule in rules)):
            return {}
        self.history.append((step, alignment(model, self.loss_fn, self.batch, self.lags)))
        return self.history[-1][1].numbers()


def _check_loss_fn(loss_fn: object, batch: object, call: str) -> None:
    """Raise for arguments in another order and for a loss of outputs and targets.

    The loss may be a module of the user's, but a batch is never a function.
    """
    kind = type(loss_fn).__name__
    if not callable(loss_fn) or (isinstance(loss_fn, nn.Module) and callable(batch)):
        raise TypeError(f"loss_fn must be a function of the model and the batch, got {kind}: call {call}")
    if type(loss_fn).__module__ == nn.MSELoss.__module__:
        raise TypeError(f"loss_fn is called with the model and the batch, got {kind}: pass {_EXAMPLE % 'criterion'}")
    if getattr(loss_fn, "__module__", None) == nn.functional.__name__:
        name = getattr(loss_fn, "__name__", kind)
        raise TypeError(f"loss_fn is called with the model and the batch, got {name}: pass {_EXAMPLE % f'F.{name}'}")


def _sharded(model: nn.Module) -> str | None:
    """The name of the first module or parameter that is sharded over processes."""
    # Compare names instead of importing torch.distributed, which takes as long to import as torch.
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return f"{name or 'a model'} in FullyShardedDataParallel"
    return next(
        (f"{name} as a {type(p).__name__}" for name, p in model.named_parameters() if type(p).__name__ == "DTensor"),
        None,
    )


@contextmanager
def _eager() -> Iterator[None]:
    """Context in which compiled modules run eagerly: torch cannot compile the training of its own LSTM."""
    if "torch._dynamo" not in sys.modules:
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


def _gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, parameters: dict[str, nn.Parameter]
) -> tuple[float, dict[str, Tensor | None]]:
    """The loss, and its gradients by name."""
    with torch.enable_grad():
        loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar tensor, got one of shape {tuple(loss.shape)}: take its mean")
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return float(loss.detach()), dict(zip(parameters, grads, strict=True))


def _warn_of_two_losses(ours: float, exact: float) -> None:
    """Warn if the losses of the two passes differ, although every rule has the same forward pass."""
    if abs(ours - exact) > _SAME_LOSS * max(abs(ours), abs(exact)):
        warnings.warn(
            f"alignment needs the same loss in both passes, got {ours:g} under the rule and {exact:g} under BPTT: the "
            "model or loss_fn depends on state that a pass changes and that is not an attribute of a module",
            stacklevel=3,
        )


@contextmanager
def _passed(layers: Iterable[Any]) -> Iterator[list[bool]]:
    """Context with a list that becomes non-empty when a gradient passes through one of the layers."""
    passed: list[bool] = []

    def watch(layer: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: passed.append(True))  # type: ignore[no-untyped-call]

    hooks = [layer.register_forward_hook(watch) for layer in layers]
    try:
        yield passed
    finally:
        for hook in hooks:
            hook.remove()
