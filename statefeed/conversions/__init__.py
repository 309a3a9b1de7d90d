"""Table of classes of other packages that ``swap`` converts, with one file per package.

A class is found by its module and name, so that no package is imported. Its row is a subclass of ``ConvertedLayer``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from statefeed.conversions.protocol import ConvertedLayer
from statefeed.conversions.xlstm import XLSTMCell
from statefeed.joined_class import joined_class

CONVERSIONS: dict[str, type[ConvertedLayer]] = {
    "xlstm.blocks.slstm.cell.sLSTMCell_vanilla": XLSTMCell,
    "xlstm.blocks.slstm.cell.sLSTMCell_cuda": XLSTMCell,
}


def conversion(kind: type) -> type[ConvertedLayer] | None:
    """The row of the table for a class; None if there is none."""
    return CONVERSIONS.get(f"{kind.__module__}.{kind.__qualname__}")


def converted(theirs: type) -> type[ConvertedLayer]:
    """The class that inherits from the row of another package's class, then from that class; one for each."""
    ours = CONVERSIONS[f"{theirs.__module__}.{theirs.__qualname__}"]
    made: type[ConvertedLayer] = joined_class(theirs, (ours, theirs), new_converted)
    return made


def new_converted(theirs: type, *arguments: Any) -> nn.Module:
    """Create an object of the converted class without its state, for pickle and copy."""
    kind = converted(theirs)
    return kind.__new__(kind, *arguments)


__all__ = ["CONVERSIONS", "ConvertedLayer", "conversion", "converted"]
