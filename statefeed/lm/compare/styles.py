"""How a rule is drawn in every figure."""

from collections.abc import Iterable
from typing import NamedTuple

_COLORS = {"bptt": "black", "torch": "0.3", "ft-bptt": "0.6"}
_COLORS |= {"dsf": "C0", "gate": "C1", "gate+1": "C2", "gate+2": "C3"}
_FREE = ("C4", "C5", "C6", "C8", "navy", "teal")
_LINES, _MARKERS, _HATCHES = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v"), ("", "//", "..", "xx")


class Style(NamedTuple):
    """How a rule is drawn in every figure of a section: a color, and where that is another's too, a line of its own.

    Args:
        color: of lines, points and bars.
        line: style of lines.
        marker: of points.
        hatch: of bars.
    """

    color: str
    line: str = _LINES[0]
    marker: str = _MARKERS[0]
    hatch: str = _HATCHES[0]


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A look of its own for every label; the usual rules have theirs in every figure.

    >>> styles(["dsf", "a", "b", "a"])["b"]
    Style(color='C5', line='-', marker='o', hatch='')
    """
    found: dict[str, Style] = {}
    taken = 0
    for label in dict.fromkeys(labels):
        if label in _COLORS:
            found[label] = Style(_COLORS[label])
        else:
            again, place = divmod(taken, len(_FREE))
            found[label] = Style(_FREE[place], *(of[again % len(of)] for of in (_LINES, _MARKERS, _HATCHES)))
            taken += 1
    return found
