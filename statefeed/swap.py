"""torch.nn's RNN, GRU and LSTM inside a model become statefeed's, and back, in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from statefeed.feedback import Feedback, FeedbackLike, as_feedback
from statefeed.layers import GRU, LSTM, RNN, RecurrentLayer

_OURS: dict[type[nn.Module], type[RecurrentLayer]] = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}
_TORCHS: dict[type[nn.Module], type[nn.Module]] = {ours: torchs for torchs, ours in _OURS.items()}


@dataclass(frozen=True)
class SwapReport:
    """What ``swap`` did, or would do.

    Attributes:
        swapped: by module name, the layer as it prints.
        kept: by module name, why the layer was left as it is.
    """

    swapped: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"swapped  {name or '(the model)'}: {layer}" for name, layer in self.swapped.items()]
        lines += [f"kept     {name or '(the model)'}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines) or "no torch.nn.RNN, GRU or LSTM in this model"


def swap(
    model: nn.Module,
    feedback: FeedbackLike | None = None,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    dry_run: bool = False,
) -> SwapReport:
    """Every torch.nn.RNN, GRU and LSTM of a model becomes statefeed's, in place.

    The module objects stay, and change their class: parameters, names, hooks, training flag, device, dtype and whatever
    shares or ties them are untouched, and an optimizer built before keeps working.

    Args:
        model: any module, also a recurrent layer itself.
        feedback: the rule of all layers, in every spelling of ``Feedback``. If None, torch's layers become exact
            (``"bptt"``), and layers that are statefeed's already keep their rule.
        include: a shell pattern of module names (``"encoder.*"``), or several; the model itself is ``""``.
        exclude: a pattern of names to leave alone, or several.
        dry_run: report only, change nothing.

    Returns:
        ``SwapReport``: what was swapped, and what was kept and why. Printing it gives one line a layer.

    Gradient: exact by default; otherwise it follows the rule from the next forward pass on.

    Raises:
        ValueError: an unknown rule.

    Cost: none per parameter.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.GRU(2, 3))
        >>> print(swap(model))
        swapped  0: GRU(2, 3, feedback='bptt')
        >>> print(restore(model)[0])
        GRU(2, 3)
    """
    rule = as_feedback("bptt" if feedback is None else feedback)
    include, exclude = ((names,) if isinstance(names, str) else tuple(names) for names in (include, exclude))
    swapped: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNBase):
            continue
        reason = _reason_to_keep(name, module, rule, include, exclude)
        if reason is None and feedback is None and isinstance(module, RecurrentLayer):
            reason = f"a statefeed layer already, with feedback {str(module.feedback)!r}"
        if reason is not None:
            kept[name] = reason
            continue
        if not dry_run:
            module.__class__ = _OURS.get(type(module), type(module))
            module.feedback = rule
        described = nn.RNNBase.extra_repr(module)
        swapped[name] = f"{type(module).__name__}({described}, feedback={str(rule)!r})"
    return SwapReport(swapped, kept)


def restore(model: nn.Module) -> nn.Module:
    """Every statefeed layer of a model becomes torch.nn's plain layer again, in place.

    Args:
        model: any module.

    Returns:
        The same model, plain torch.nn again: torch's types, the same parameters and state_dict.

    Gradient: exact from the next forward pass on.

    Cost: none per parameter.

    Example:
        >>> from torch import nn
        >>> type(restore(GRU(2, 3))) is nn.GRU
        True
    """
    for module in model.modules():
        plain = _TORCHS.get(type(module))
        if plain is not None and isinstance(module, RecurrentLayer):
            module.remove_feedback()
            module.__class__ = plain  # type: ignore[assignment]
            module.flatten_parameters()
    return model


def _reason_to_keep(
    name: str, module: nn.RNNBase, rule: Feedback, include: tuple[str, ...], exclude: tuple[str, ...]
) -> str | None:
    kind = type(module)
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if kind not in _OURS and kind not in _TORCHS:
        return f"{kind.__module__}.{kind.__qualname__} is a subclass with code of its own"
    # Whether a rule fits is a question to our class; the module is of that class only while it answers.
    module.__class__ = _OURS.get(kind, kind)
    try:
        reason: str | None = module.unsupported_reason(rule)  # type: ignore[operator]
    finally:
        module.__class__ = kind
    return reason
