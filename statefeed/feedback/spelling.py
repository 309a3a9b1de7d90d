"""Spellings of rules: "name", "name(number)" or a number, each with an optional suffix "+k"."""

from __future__ import annotations

import re

from statefeed.feedback.protocol import Diagonal
from statefeed.feedback.table import DIAGONALS

SPELLINGS = (
    'None, "bptt", "torch", "ft-bptt", "dsf", "ramp(cap)", "log_spaced(longest)", "calibrated", "fitted", "gate", '
    '"jacobian", a number, or a tensor (S,) or (L * directions, S)'
)


def parse(spelling: str) -> tuple[Diagonal | float, int]:
    """The diagonal, or a number for a constant one, and k.

    Raises:
        ValueError: an unknown name, or a number where none belongs.

    Example:
        >>> parse("ramp(0.9)+2")
        (Ramp(cap=0.9), 2)
    """
    match = re.fullmatch(r"(?P<name>[^+(]+?|.*?[\d.]e\+\d+)(?:\((?P<number>.+)\))?(?:\+(?P<k>\d+))?", spelling.strip())
    name, number, k = (match["name"], match["number"], int(match["k"] or 0)) if match else ("", None, 0)
    try:
        if name not in DIAGONALS:
            return float(name), k
        arguments = [] if number is None else [float(number)]
    except ValueError:
        raise ValueError(f"feedback must be {SPELLINGS}, each with an optional suffix +k, got {spelling!r}") from None
    try:
        return DIAGONALS[name](*arguments), k
    except TypeError:
        takes = "takes no number" if arguments else "needs a number in parentheses"
        raise ValueError(f'feedback "{name}" {takes}, got {spelling!r}') from None
