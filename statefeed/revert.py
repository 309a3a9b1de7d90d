"""Context managers around the conversion of modules: nothing changes on an error, which names the layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

# Dictionaries that a conversion changes in place.
_CONTENTS = ("_forward_pre_hooks", "_other_learned")


@contextmanager
def reverted_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the class, attributes and hooks of modules if the block raises.

    Args:
        modules: every module that the block changes.
    """
    before = [(module, type(module), dict(vars(module)), _contents(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, kind, attributes, contents in before:
            set_class(module, kind)
            vars(module).clear()
            vars(module).update(attributes)
            for name, items in contents.items():
                attributes[name].clear()
                attributes[name].update(items)
        raise


@contextmanager
def layer_named(what: str, name: str) -> Iterator[None]:
    """Name the layer in an error of its conversion.

    Args:
        what: name of the function that converts the model.
        name: module name of the layer.

    Raises:
        RuntimeError: the block raised.
    """
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"{what} left the model unchanged, because the layer {name or '(the model)'} raised "
            f"{type(error).__name__}: {error}"
        ) from error


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of an object, past a ``__setattr__`` of its class.

    Args:
        module: the object.
        kind: its new class.
    """
    object.__setattr__(module, "__class__", kind)


def _contents(module: nn.Module) -> dict[str, dict[object, object]]:
    return {name: dict(vars(module)[name]) for name in _CONTENTS if name in vars(module)}
