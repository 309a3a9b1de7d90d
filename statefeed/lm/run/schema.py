"""Owns the shape of what is read back from JSON: whether a value is what was written, and in words where it is not."""

import math
from typing import Any

_WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


def checked(value: Any, shape: Any) -> Any:
    """The value, which has the shape.

    Args:
        value: read from JSON.
        shape: str, int, or float, which is finite and takes whole numbers, too, or math.nan for a number of any kind;
            {key: shape} for an object with these keys among others, {...: shape} for one whose values all have a shape;
            [shape] for a list; a tuple of shapes of which one is enough, with None for what may be null or missing.

    Raises:
        ValueError: when it has not, saying where.

    >>> checked({"step": 3, "more": []}, {"step": float, "loss": (float, None)})
    {'step': 3, 'more': []}
    >>> checked({"valid": [{"step": 3}, {"step": "x"}]}, {"valid": [{"step": float}]})
    Traceback (most recent call last):
    ValueError: valid[1].step must be a number, got 'x'
    >>> checked("bench", {"bench": str})
    Traceback (most recent call last):
    ValueError: it must be an object, got 'bench'
    """
    if wrong := _misfit(value, shape, ""):
        raise ValueError(wrong)
    return value


def _misfit(value: Any, shape: Any, name: str) -> str | None:
    """What is wrong with a value of this name, None where nothing is."""
    if isinstance(shape, tuple):
        found = [_misfit(value, one, name) for one in shape]
        return None if None in found else found[0]
    kind = shape if isinstance(shape, type) else type(shape)
    kinds: tuple[type[Any], ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return f"{name or 'it'} must be {_WORDS.get(kind)}, got {value!r:.40}"
    if shape is float and not -math.inf < value < math.inf:
        return f"{name or 'it'} must be finite, got {value}"
    if isinstance(shape, list):
        parts = [_misfit(item, shape[0], f"{name}[{place}]") for place, item in enumerate(value)]
    elif isinstance(shape, dict):
        inner = dict.fromkeys(value, shape[...]) if ... in shape else shape
        parts = [_misfit(value.get(key), one, f"{name}.{key}".removeprefix(".")) for key, one in inner.items()]
    else:
        parts = []
    return next(filter(None, parts), None)
