"""Table of classes of other packages that ``swap`` converts, with one file per package.

A class is found by its module and name, so that no package is imported. Its row is a subclass of ``ConvertedLayer``.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from statefeed.conversions.protocol import ConvertedLayer
from statefeed.conversions.xlstm import XLSTMCell

CONVERSIONS: dict[str, type[ConvertedLayer]] = {
    "xlstm.blocks.slstm.cell.sLSTMCell_vanilla": XLSTMCell,
    "xlstm.blocks.slstm.cell.sLSTMCell_cuda": XLSTMCell,
}
_CONVERTED: dict[type, type[ConvertedLayer]] = {}


def conversion(kind: type) -> type[ConvertedLayer] | None:
    """The row of the table for a class; None if there is none."""
    return CONVERSIONS.get(f"{kind.__module__}.{kind.__qualname__}")


def converted(theirs: type) -> type[ConvertedLayer]:
    """The class that inherits from the row of another package's class, then from that class; one for each.

    An object is pickled and copied by the name of the other package's class.
    """
    if theirs in _CONVERTED:
        return _CONVERTED[theirs]
    ours = CONVERSIONS[f"{theirs.__module__}.{theirs.__qualname__}"]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # Protocols 0 and 1 store the class by name, but no module has the converted class as an attribute.
        _, arguments, *state = super(made, self).__reduce_ex__(max(int(protocol), 2))  # type: ignore[misc]
        return (new_converted, (theirs, *arguments[1:]), *state)

    namespace = {
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__doc__": theirs.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "plain_class": theirs,
    }
    made: type[ConvertedLayer] = types.new_class(
        theirs.__name__, (ours, theirs), exec_body=lambda body: body.update(namespace)
    )
    _CONVERTED[theirs] = made
    return made


def new_converted(theirs: type, *arguments: Any) -> nn.Module:
    """Create an object of the converted class without its state, for pickle and copy."""
    kind = converted(theirs)
    return kind.__new__(kind, *arguments)


__all__ = ["CONVERSIONS", "ConvertedLayer", "conversion", "converted"]
