"""How a rule is drawn in every figure."""

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

Line: TypeAlias = str | tuple[int, tuple[int, ...]]

# Line and marker are those of one rule alone, so that a figure can be read without its colors.
_LINES: tuple[Line, ...] = ("-", "--", ":", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_EXACT = ("black", "0.3")
_COLORS = ("0.6", "C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "navy", "teal")
_USUAL = ("bptt", "torch", "ft-bptt", "dsf", "gate", "gate+1", "jacobian", "jacobian+1", "calibrated", "fitted")


class Style(NamedTuple):
    """How a rule is drawn in every figure of a section.

    Args:
        color: of lines and points.
        line: style of lines, as matplotlib takes it.
        marker: of points.
    """

    color: str
    line: Line
    marker: str


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A look of its own for every label; the usual rules have theirs in every figure.

    >>> styles(["dsf", "a", "b", "a"])["b"]
    Style(color='navy', line=(0, (6, 1)), marker='s')
    """
    own = list(dict.fromkeys(labels))
    places = {label: place for place, label in enumerate(dict.fromkeys([*_USUAL, *own]))}
    return {label: _style(places[label]) for label in own}


def _style(place: int) -> Style:
    """The look of the rule at a place; pairs of line and marker repeat after 70."""
    color = _EXACT[place] if place < len(_EXACT) else _COLORS[(place - len(_EXACT)) % len(_COLORS)]
    return Style(color, _LINES[place % len(_LINES)], _MARKERS[place % len(_MARKERS)])
