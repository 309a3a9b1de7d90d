"""Spellings of rules: "name", "name(number)" or a number, each with an optional suffix "+k"."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence

from statefeed.feedback.protocol import Diagonal
from statefeed.feedback.table import DIAGONALS

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
    if not _takes(name, arguments):
        takes = "takes no number" if arguments else "needs a number in parentheses"
        raise ValueError(f'feedback "{name}" {takes}, got {spelling!r}')
    return DIAGONALS[name](*arguments), k


def spellings() -> str:
    """The valid rules, as error messages list them; from the table, so also those that a user has added.

    Example:
        >>> spellings()[:50]
        'None, "bptt", "torch", "ft-bptt", "dsf", "ramp(cap'
    """
    names = [name if _takes(name, []) else f"{name}({_parameter(name)})" for name in DIAGONALS]
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"None, {quoted}, a number, or a tensor (S,) or (L * directions, S)"


def _takes(name: str, arguments: Sequence[float]) -> bool:
    """Whether a rule of the table is made from these arguments; an error of its constructor is another matter."""
    try:
        inspect.signature(DIAGONALS[name]).bind(*arguments)
    except TypeError:
        return False
    return True


def _parameter(name: str) -> str:
    return next(iter(inspect.signature(DIAGONALS[name]).parameters))


def _unknown(spelling: str) -> str:
    """The error message for an invalid spelling, with a suggestion."""
    if re.fullmatch(r"fused[-_]bptt(\+\d+)?", spelling.strip()):
        return f'fused-bptt is now bptt: feedback must be "bptt", got {spelling!r}'
    near = _nearest(spelling)
    hint = f': did you mean "{near}"?' if near else ""
    return f"feedback must be {spellings()}, each with an optional suffix +k, got {spelling!r}{hint}"


def _nearest(spelling: str) -> str | None:
    """The rule with the most similar name, with the number and suffix of the spelling; None if no name is similar.

    Example:
        >>> _nearest("DSF"), _nearest("gate 1"), _nearest("gate+"), _nearest("none"), _nearest("nothing")
        ('dsf', 'gate+1', 'gate', 'bptt', None)
    """
    match = re.fullmatch(r"([a-z_-]+)\s*(\(.*\))?(?:[\s+]*(\d+)|\s*\+)?", spelling.strip().lower())
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
    except (TypeError, ValueError):
        return None
    return suggestion
