"""Classes that join a class of statefeed with a user's class."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_JOINED: dict[tuple[type, ...], Any] = {}


def joined_class(theirs: type, bases: tuple[type, ...], new: Callable[..., nn.Module]) -> Any:
    """A class with the name of a user's class that inherits from it and from one of statefeed's; one for each bases.

    Args:
        theirs: the user's class, which is one of the bases.
        bases: in the order of method resolution.
        new: a function of a module that creates an object without its state from ``theirs`` and the arguments of
            ``__new__``. Objects are pickled and copied through it, by the name of the user's class.
    """
    if bases in _JOINED:
        return _JOINED[bases]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # Protocols 0 and 1 store the class by name, but no module has the joined class as an attribute.
        _, arguments, *state = super(made, self).__reduce_ex__(max(int(protocol), 2))
        return (new, (theirs, *arguments[1:]), *state)

    namespace = {
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__doc__": theirs.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "plain_class": theirs,
    }
    with _unregistered(theirs):
        made: Any = types.new_class(theirs.__name__, bases, exec_body=lambda body: body.update(namespace))
    _JOINED[bases] = made
    return made


@contextmanager
def _unregistered(theirs: type) -> Iterator[None]:
    """Context in which a subclass does not run ``__init_subclass__``, by which a registry would replace the user's."""
    own = vars(theirs).get("__init_subclass__")
    type.__setattr__(theirs, "__init_subclass__", classmethod(lambda cls, **arguments: None))
    try:
        yield
    finally:
        if own is None:
            type.__delattr__(theirs, "__init_subclass__")
        else:
            type.__setattr__(theirs, "__init_subclass__", own)
