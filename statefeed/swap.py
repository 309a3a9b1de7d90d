"""In-place conversion of a model's recurrent layers, torch.nn's and those of other packages, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from statefeed.conversions import conversion, converted
from statefeed.feedback import Feedback, FeedbackLike, as_feedback
from statefeed.mixin import FeedbackLayer
from statefeed.model_argument import SWAP_IS_IN_PLACE, check_model
from statefeed.revert import layer_named, reverted_on_error, set_class
from statefeed.subclass import OURS, joined, torchs_class, unsupported_subclass
from statefeed.user_warning import warn

_TORCHS: dict[type[nn.Module], type[nn.Module]] = {ours: torchs for torchs, ours in OURS.items()}


@dataclass(frozen=True)
class SwapReport:
    """Result of ``swap``: which layers it converted, or would convert, and which it left unchanged.

    Attributes:
        swapped: module name -> ``repr`` of the layer.
        kept: module name -> reason why the layer was not converted.
        outside: module name -> recurrent code that ``swap`` cannot convert, and how to convert it by hand.
    """

    swapped: dict[str, str]
    kept: dict[str, str]
    outside: dict[str, str] = field(default_factory=dict)
    _called: set[str] = field(default_factory=set, repr=False, compare=False)
    _ours: list[str] = field(default_factory=list, repr=False, compare=False)  # kept because they are statefeed's

    def ran(self) -> dict[str, bool]:
        """Report whether each swapped layer, or a copy of it, was called since ``swap``.

        Layers that were statefeed's before ``swap`` are in the report too.

        False after a training step means that the step does not use the layer: the model calls ``forward`` directly,
        uses the weights in its own code, or runs another network. Calls inside ``torch.compile``, and calls of a layer
        that was loaded from a pickle, are not counted.

        Returns:
            Module name -> whether the layer was called.
        """
        return {name: name in self._called for name in (*self.swapped, *self._ours)}

    # The report is not the model: what is done with the result in ``model = sf.swap(model)``.
    def __getattr__(self, name: str) -> NoReturn:
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(message if name.startswith("_") else f"{message}: {SWAP_IS_IN_PLACE}")

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise: the report is not the model.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"the report is not callable: {SWAP_IS_IN_PLACE}")

    def __getitem__(self, key: object) -> NoReturn:
        raise TypeError(f"the report has no items: {SWAP_IS_IN_PLACE}")

    def __str__(self) -> str:
        groups = {"swapped": self.swapped, "kept": self.kept, "outside": self.outside}
        lines = [
            f"{group:<8} {name or '(the model)'}: {text}" for group, of in groups.items() for name, text in of.items()
        ]
        return "\n".join(lines) or "no torch.nn.RNN, GRU or LSTM in this model"


def swap(
    model: nn.Module,
    feedback: FeedbackLike | None = None,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    dry_run: bool = False,
) -> SwapReport:
    """Convert every torch.nn.RNN, GRU and LSTM of a model, and sLSTM cell of the xlstm package, in place.

    Only the class of the module objects changes. Parameters, names, hooks, the training flag, device, dtype and tied
    weights stay as they are, and an existing optimizer keeps working. A layer of a subclass that inherits ``forward``
    or calls ``super().forward`` stays an instance of that subclass: its new class inherits from both.

    Args:
        model: any module, including a recurrent layer.
        feedback: the rule of all layers, in any spelling of ``Feedback``. If None, torch's layers become exact
            (``"bptt"``), and statefeed layers keep their rule.
        include: shell pattern of the names of recurrent layers (``"encoder.*"``), or several; the name of the model
            itself is ``""``.
        exclude: shell pattern of names to leave unchanged, or several.
        dry_run: only report; do not change the model.

    Returns:
        ``SwapReport``: the swapped layers, the other layers with the reason, and recurrent code that ``swap`` cannot
        convert. It prints one line per layer. After a training step, ``ran()`` reports which swapped layers the step
        called.

    Gradient: exact by default; otherwise that of the rule, from the next forward pass on.

    Raises:
        TypeError: the first argument is not a module, or a pattern is no string.
        ValueError: an unknown rule, or a pattern that matches no recurrent layer.
        RuntimeError: the class of a layer raised an error during the conversion. No layer is changed then.

    Warns:
        UserWarning: no layer was converted, and the model has torch.nn's, or has none.

    Cost: none per parameter.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.GRU(2, 3))
        >>> print(swap(model))
        swapped  0: GRU(2, 3, feedback='bptt')
        >>> print(restore(model)[0])
        GRU(2, 3)
    """
    check_model(model, "swap(model, feedback)")
    rule = as_feedback("bptt" if feedback is None else feedback)
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    layers: dict[str, Any] = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, (nn.RNNBase, FeedbackLayer)) or conversion(type(m)) is not None
    }
    _check_patterns("include", include, layers)
    _check_patterns("exclude", exclude, layers)
    report = SwapReport({}, {}, dict(_outside(model)))
    chosen: dict[str, Any] = {}
    for name, module in layers.items():
        reason = _reason_to_keep(name, module, rule, include, exclude)
        if reason is None and feedback is None and isinstance(module, FeedbackLayer):
            exact = "" if module.feedback.exact else '; feedback="bptt" makes it exact'
            reason = f"already a statefeed layer, with feedback {str(module.feedback)!r}{exact}"
            report._ours.append(name)
        if reason is None:
            chosen[name] = module
        else:
            report.kept[name] = reason
    if not dry_run:
        with reverted_on_error(chosen.values()):
            for name, module in chosen.items():
                with layer_named("swap", name):
                    _convert(module, rule)
        for name in (*chosen, *report._ours):
            _record_first_call(layers[name], name, report)
    report.swapped.update({name: _described(module, rule) for name, module in chosen.items()})
    ours = any(isinstance(m, FeedbackLayer) for m in model.modules())
    if not dry_run and not report.swapped and (not ours or any(_is_torchs(m) for m in layers.values())):
        warn(f"swap changed nothing: {report}")
    return report


def restore(model: nn.Module) -> nn.Module:
    """Convert every statefeed layer of a model back to torch.nn's plain layer, in place.

    Args:
        model: any module.

    Returns:
        The same model object as plain torch.nn again, with the same parameters and state_dict. Layers of a subclass
        have their original class again.

    Gradient: exact from the next forward pass on.

    Raises:
        TypeError: the argument is not a module.
        RuntimeError: the class of a layer raised an error during the conversion. No layer is changed then.

    Warns:
        UserWarning: for every statefeed layer that could not be restored, with the reason.

    Cost: none per parameter.

    Example:
        >>> from torch import nn
        >>> import statefeed as sf
        >>> type(restore(sf.GRU(2, 3))) is nn.GRU
        True
    """
    check_model(model, "restore(model)")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FeedbackLayer)}
    with reverted_on_error(layers.values()):
        for name, module in layers.items():
            kind = type(module)
            plain = _TORCHS.get(kind) or vars(kind).get("plain_class")
            reason = _changed_by_others(module, "restore")
            if reason is None and plain is None:
                reason = (
                    f"{kind.__module__}.{kind.__qualname__} is defined on statefeed's layers, and torch has no such "
                    "layer"
                )
            if reason is not None:
                warn(f"restore left {name or '(the model)'}: {reason}")
                continue
            with layer_named("restore", name):
                _convert_back(module, plain)
    return model


def _convert(module: Any, rule: Feedback) -> None:
    if _is_class_forward(module):
        del module.forward
    set_class(module, _our_class(module))
    module.feedback = rule


def _convert_back(module: FeedbackLayer, plain: Any) -> None:
    if _is_class_forward(module):
        del module.forward
    module.remove_feedback()
    _remove_hooks(module)
    set_class(module, plain)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()


class _FirstCall:
    """Forward pre-hook that records the first call of a layer and removes itself."""

    def __init__(self, name: str, called: set[str]) -> None:
        self.name, self.called = name, called

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.called.add(self.name)
            _remove_hooks(module)

    def __deepcopy__(self, memo: Any) -> _FirstCall:
        # A call of a deep copy counts too: some packages train a copy of the model.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _FirstCall, (self.name, set())


def _record_first_call(module: nn.Module, name: str, report: SwapReport) -> None:
    module.register_forward_pre_hook(_FirstCall(name, report._called))


def _remove_hooks(module: nn.Module) -> None:
    """Remove the hooks with which ``swap`` records whether a layer was called."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _FirstCall)]:
        del hooks[key]


def _patterns(option: str, names: str | Iterable[str]) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else (None,)
    if not all(isinstance(name, str) for name in found):
        raise TypeError(f"{option} must be a shell pattern of layer names, or several, got {names!r}")
    return found


def _check_patterns(option: str, patterns: tuple[str, ...], layers: Iterable[str]) -> None:
    for pattern in patterns:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in layers):
            found = ", ".join(repr(name) for name in layers) or "none"
            raise ValueError(
                f"{option}={pattern!r} must match the name of a recurrent layer; the model's recurrent layers: {found}"
            )


def _our_class(module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    if isinstance(module, FeedbackLayer):
        return kind
    if conversion(kind) is not None:
        return converted(kind)
    return OURS[kind] if kind in OURS else joined(kind)


def _described(module: nn.Module, rule: Feedback) -> str:
    """The ``repr`` of a layer under a rule, also of one that a dry run has not converted."""
    kind = type(module)
    base = torchs_class(kind)
    if base is not None:
        return f"{kind.__name__}({base.extra_repr(module)}, feedback={str(rule)!r})"
    return repr(module) if isinstance(module, FeedbackLayer) else f"{repr(module)[:-1]}, feedback={str(rule)!r})"


def _reason_to_keep(
    name: str, module: nn.Module, rule: Feedback, include: tuple[str, ...], exclude: tuple[str, ...]
) -> str | None:
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if isinstance(module, FeedbackLayer):
        return module.unsupported_rule(rule)
    kind = type(module)
    reason = _changed_by_others(module, "swap")
    ours = conversion(kind)
    if reason is None and ours is not None:
        reason = ours.unsupported_module(module)
    elif reason is None and kind not in OURS:
        reason = unsupported_subclass(module)
    if reason is not None:
        return reason
    # Only statefeed's class can check a rule, so the module is given that class during the check.
    set_class(module, _our_class(module))
    try:
        return module.unsupported_reason(rule)  # type: ignore[operator, no-any-return]
    finally:
        set_class(module, kind)


def _changed_by_others(module: nn.Module, what: str) -> str | None:
    """Why the class of a layer cannot be changed now; ``what`` is the name of the calling function."""
    if "forward" in vars(module) and not _is_class_forward(module):
        return (
            f"its forward was replaced on the object, as accelerate's hooks do: {what} before that, or remove the hooks"
        )
    if any(is_lazy(p) for p in module.parameters()):
        return f"its parameters are not initialized, and its class changes when they are: {what} after the first call"
    # Both create a new class for the object, and find its original class by position among the bases.
    if parametrize.is_parametrized(module):
        return f"it is parametrized: {what} before you parametrize or shard"
    if any(base.__name__ == "FSDPModule" and base.__module__.startswith("torch.") for base in type(module).__mro__):
        return f"it is sharded by fully_shard: {what} before you parametrize or shard"
    return None


def _is_class_forward(module: nn.Module) -> bool:
    """Whether an object's ``forward`` attribute is its class's method, which accelerate sets on removing a hook."""
    forward = vars(module).get("forward")
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


def _outside(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Recurrent code of a model that is not a torch layer: (module name, what to do about it)."""
    known = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.RNNCellBase):
            bases = (base.__name__ for base in type(module).__mro__ if base in (nn.RNNCell, nn.GRUCell, nn.LSTMCell))
            layer = next(bases, "GRUCell").removesuffix("Cell")
            # Without corrections a rule loses the path from h to c on Recurrent.
            other = "" if layer == "LSTM" else ", or statefeed.Recurrent"
            yield name, f"{kind} is called in a loop: use statefeed.{layer} over the whole sequence{other}"
        if isinstance(module, torch.jit.ScriptModule) and module.original_name in ("RNN", "GRU", "LSTM"):
            yield name, f"{module.original_name} is scripted: swap the model that was scripted, and use that one"
        backend = getattr(module, "recurrent_backend", None)
        if backend in ("scan", "triton"):
            yield name, f"{kind} runs its layer with its own code: build it with recurrent_backend='pad'"
        for attribute, value in vars(module).items():
            for hidden in _modules_in(value):
                if id(hidden) not in known and any(_is_torchs(m) and id(m) not in known for m in hidden.modules()):
                    path = f"{name}.{attribute}".lstrip(".")
                    yield path, f"{type(hidden).__name__} is not among the model's modules: call swap on it as well"


def _is_torchs(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and not isinstance(module, FeedbackLayer)


def _modules_in(value: Any) -> Iterator[nn.Module]:
    """The modules in the value of an attribute: a module, or a list, tuple or dict of modules."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, dict):
        yield from (v for v in value.values() if isinstance(v, nn.Module))
    elif isinstance(value, (list, tuple)):
        yield from (v for v in value if isinstance(v, nn.Module))
