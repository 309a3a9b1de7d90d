"""Conversion of user-defined subclasses of torch's recurrent layers: which are supported, and their joined class.

``theirs`` is the user's class, ``ours`` is statefeed's layer with the same torch base.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from statefeed.joined_class import joined_class
from statefeed.layers import GRU, LSTM, RNN, RecurrentLayer
from statefeed.mixin import FeedbackLayer

OURS: dict[type[nn.Module], type[RecurrentLayer]] = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}
_FORWARDS = tuple(kind.forward for kind in OURS)
_FUNCTIONS = tuple(getattr(torch, name) for name in ("rnn_tanh", "rnn_relu", "gru", "lstm"))
# Instance attributes of a statefeed layer, in addition to the names that its classes define.
_STORED = {"_feedback", "_rules", "_learned_rule", "_other_learned", "diagonal", "diagonal_updates"}


def torchs_class(kind: type) -> type[nn.Module] | None:
    """torch.nn.RNN, GRU or LSTM, whichever a class is or inherits from; None if it is neither."""
    return next((base for base in kind.__mro__ if base in OURS), None)


def unsupported_subclass(module: nn.Module) -> str | None:
    """Why a layer of a user's subclass cannot be converted, in one sentence; None if it can."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    base = torchs_class(kind)
    if base is None:
        return f"{name} is a subclass of torch.nn.RNNBase, not of torch.nn.RNN, GRU or LSTM"
    theirs = kind.__mro__[: kind.__mro__.index(base)]
    reason = _bypass(name, theirs)
    if reason is not None:
        return reason
    # Bases after torch's count too: ours would be before them in the method resolution order.
    others = [k for k in kind.__mro__ if k not in base.__mro__]
    defined = set().union(*(vars(k) for k in others), vars(module), *(d for d in _registered(module)))
    for method in ("__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__"):
        if any(method in vars(k) for k in others):
            return f"{name} defines {method}, by which its objects would be copied or pickled without a rule"
    clash = sorted(defined & _names_of(OURS[base]))
    if clash:
        return f"{name} defines an attribute {clash[0]!r}, which statefeed's layer needs"
    try:
        joined(kind)
    except Exception as error:  # also of a metaclass of the user's
        return f"{name} cannot be joined with statefeed's class: {error}"
    return None


def joined(theirs: type) -> type[RecurrentLayer]:
    """The class that inherits from a user's subclass of torch's layer and from ours; one class per subclass.

    In the method resolution order ours is between theirs and torch's, so that methods that theirs inherits, or calls by
    ``super()``, are ours.
    """
    base = torchs_class(theirs)
    assert base is not None
    made: type[RecurrentLayer] = joined_class(theirs, (theirs, OURS[base]), new_joined)
    return made


def new_joined(theirs: type, *arguments: Any) -> nn.Module:
    """Create an object of the joined class without its state, for pickle and copy."""
    kind = joined(theirs)
    return kind.__new__(kind, *arguments)


def _bypass(name: str, classes: tuple[type, ...]) -> str | None:
    """Why the methods of the classes would bypass our forward pass; None if they do not.

    This inspects the names in the code and runs nothing. Calls through functions outside the classes, or through
    getattr, are not detected.
    """
    calls_super, has_forward = False, False
    for kind in classes:
        for attribute, value in vars(kind).items():
            function = inspect.unwrap(value) if callable(value) else None
            if attribute == "forward":
                has_forward = True
                if not isinstance(function, types.FunctionType):
                    return f"{name}.forward is {type(value).__name__}, not a function whose code can be read"
            if not isinstance(function, types.FunctionType):
                continue
            scope = {**function.__globals__, **_closure(function)}
            for code in _codes(function.__code__):
                calls_super |= {"super", "forward"} <= set(code.co_names)
                for dotted in _dotted_names(code):
                    if _is_torchs_own(dotted, scope):
                        return f"{name}.{attribute} calls {'.'.join(dotted)} by name, which bypasses statefeed's layer"
    if has_forward and not calls_super:
        return f"{name} overrides forward without calling super().forward"
    return None


def _is_torchs_own(dotted: tuple[str, ...], scope: Mapping[str, Any]) -> bool:
    """Whether a dotted name is the forward method of a torch layer, or a torch function that runs a whole layer."""
    if "_VF" in dotted:
        return True
    value = scope.get(dotted[0])
    for attribute in dotted[1:]:
        if value is torch._VF:
            return True
        value = getattr(value, attribute, None)
    return any(value is known for known in (*_FORWARDS, *_FUNCTIONS))


def _dotted_names(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The names in a code object, each with the attributes read from it: ("nn", "GRU", "forward")."""
    found: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") and found:
            found.append(str(instruction.argval))
            continue
        if found:
            yield tuple(found)
        starts = instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "IMPORT_NAME")
        found = [str(instruction.argval)] if starts else []
    if found:
        yield tuple(found)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and the code objects of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _closure(function: types.FunctionType) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: _contents(cell) for name, cell in zip(names, function.__closure__ or (), strict=True)}


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable is not assigned yet
        return None


def _registered(module: nn.Module) -> tuple[Mapping[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _names_of(ours: type[RecurrentLayer]) -> set[str]:
    """Names that our class defines and torch's does not, without ``step``, which the layer itself never calls."""
    torchs = set(dir(torchs_class(ours)))
    defined = set().union(*(vars(kind) for kind in ours.__mro__ if issubclass(kind, FeedbackLayer)))
    return {name for name in defined | _STORED if name not in torchs and not name.startswith("__")} - {"step"}
