"""In-place conversion of a model's torch.nn RNN, GRU and LSTM layers to statefeed layers and back."""

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
    """The layers that ``swap`` changed, or would change, and the layers that it left alone.

    Attributes:
        swapped: module name -> ``repr`` of the layer.
        kept: module name -> why the layer was not changed.
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
    """Convert every torch.nn.RNN, GRU and LSTM of a model to statefeed's layer, in place.

    Only the class of the module objects changes. Parameters, names, hooks, the training flag, device, dtype and tied
    weights stay as they are, and an existing optimizer keeps working.

    Args:
        model: any module, including a recurrent layer.
        feedback: the rule of all layers, in any spelling of ``Feedback``. If None, torch's layers become exact
            (``"bptt"``), and statefeed layers keep their rule.
        include: shell pattern of module names (``"encoder.*"``), or several; the name of the model itself is ``""``.
        exclude: pattern of module names to leave alone, or several.
        dry_run: only report, do not change the model.

    Returns:
        ``SwapReport``: the swapped layers, and the others with the reason. It prints one line per layer.

    Gradient: exact by default; otherwise that of the rule, from the next forward pass on.

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
            reason = f"already a statefeed layer, with feedback {str(module.feedback)!r}"
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
    """Convert every statefeed layer of a model back to torch.nn's plain layer, in place.

    Args:
        model: any module.

    Returns:
        The same model object as plain torch.nn again, with the same parameters and state_dict.

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
        return f"{kind.__module__}.{kind.__qualname__} is a subclass with its own code"
    # Only statefeed's class can check a rule, so the module has that class during the check.
    module.__class__ = _OURS.get(kind, kind)
    try:
        reason: str | None = module.unsupported_reason(rule)  # type: ignore[operator]
    finally:
        module.__class__ = kind
    return reason
