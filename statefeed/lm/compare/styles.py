"""Colors, line styles, markers and hatches of the rules in figures."""

from collections.abc import Iterable
from typing import NamedTuple

_COLORS = {"bptt": "black", "torch": "0.3", "ft-bptt": "0.6"}
_COLORS |= {"dsf": "C0", "gate": "C1", "gate+1": "C2", "gate+2": "C3"}
_FREE = ("C4", "C5", "C6", "C8", "navy", "teal")
_LINES, _MARKERS, _HATCHES = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v"), ("", "//", "..", "xx")


class Style(NamedTuple):
    """The style of a rule in the figures of a section; rules of the same color differ in the other attributes.

    Args:
        color: color of lines, points and bars.
        line: line style.
        marker: marker of points.
        hatch: hatch of bars.
    """

    color: str
    line: str = _LINES[0]
    marker: str = _MARKERS[0]
    hatch: str = _HATCHES[0]


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A distinct style for every label; common rules have the same style in all figures.

    >>> styles(["dsf", "a", "b", "a"])["b"]
    Style(color='C5', line='-', marker='o', hatch='')
    """
    found: dict[str, Style] = {}
    assigned = 0
    for label in dict.fromkeys(labels):
        if label in _COLORS:
            found[label] = Style(_COLORS[label])
        else:
            cycle, color = divmod(assigned, len(_FREE))
            found[label] = Style(_FREE[color], *(of[cycle % len(of)] for of in (_LINES, _MARKERS, _HATCHES)))
            assigned += 1
    return found
