"""Spellings of rules: "name", "name(number)" or a number, each with an optional suffix "+k"."""

from __future__ import annotations

import difflib
import re

from statefeed.feedback.protocol import Diagonal
from statefeed.feedback.table import DIAGONALS

SPELLINGS = (
    'None, "bptt", "torch", "ft-bptt", "dsf", "ramp(cap)", "log_spaced(longest)", "calibrated", "fitted", "gate", '
    '"jacobian", a number, or a tensor (S,) or (L * directions, S)'
)

# Other names of rules, for suggestions in error messages.
_SYNONYMS = {"exact": "bptt", "full": "bptt", "fused": "bptt", "none": "bptt", "truncated": "ft-bptt"}


def parse(spelling: str) -> tuple[Diagonal | float, int]:
    """Parse a spelling into the diagonal (a number for a constant diagonal) and k.

    Raises:
        ValueError: an unknown name, a missing number, or a number after a name that takes none.

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
        raise ValueError(_unknown(spelling)) from None
    try:
        return DIAGONALS[name](*arguments), k
    except TypeError:
        takes = "takes no number" if arguments else "needs a number in parentheses"
        raise ValueError(f'feedback "{name}" {takes}, got {spelling!r}') from None


def _unknown(spelling: str) -> str:
    """The error message for an invalid spelling, with a suggestion."""
    if re.fullmatch(r"fused[-_]bptt(\+\d+)?", spelling.strip()):
        return f'fused-bptt is now bptt: feedback must be "bptt", got {spelling!r}'
    near = _nearest(spelling)
    hint = f': did you mean "{near}"?' if near else ""
    return f"feedback must be {SPELLINGS}, each with an optional suffix +k, got {spelling!r}{hint}"


def _nearest(spelling: str) -> str | None:
    """The rule with the most similar name, with the number and suffix of the spelling; None if no name is similar.

    Example:
        >>> _nearest("DSF"), _nearest("gate 1"), _nearest("none"), _nearest("nothing")
        ('dsf', 'gate+1', 'bptt', None)
    """
    match = re.fullmatch(r"([a-z_-]+)\s*(\(.*\))?(?:[\s+]*(\d+))?", spelling.strip().lower())
    if match is None:
        return None
    name, number, k = match[1].rstrip("-_"), match[2] or "", match[3]
    known = [*DIAGONALS, *_SYNONYMS]
    close = difflib.get_close_matches(name.replace("_", "-"), known, n=1) or difflib.get_close_matches(name, known, n=1)
    if not close:
        return None
    suggestion = f"{_SYNONYMS.get(close[0], close[0])}{number}" + (f"+{k}" if k else "")
    if suggestion == spelling.strip():  # the name is valid, the number is not
        return None
    try:
        parse(suggestion)
    except ValueError:
        return None
    return suggestion
