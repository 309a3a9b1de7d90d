"""Schemas of what is read from JSON: whether a value is what was written, and in words where it is not."""

import math
from typing import Any

_WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


def validate(value: Any, schema: Any) -> Any:
    """Check a value against a schema and return it.

    Args:
        value: read from JSON.
        schema: str, int, or float, which is finite and takes whole numbers, too, or math.nan for a number of any kind;
            {key: schema} for an object with these keys among others, {...: schema} for one whose values all fit it;
            [schema] for a list; a tuple of schemas of which one is enough, with None for what may be null or missing.

    Raises:
        ValueError: when it does not fit, saying where.

    >>> validate({"step": 3, "more": []}, {"step": float, "loss": (float, None)})
    {'step': 3, 'more': []}
    >>> validate({"valid": [{"step": 3}, {"step": "x"}]}, {"valid": [{"step": float}]})
    Traceback (most recent call last):
    ValueError: valid[1].step must be a number, got 'x'
    >>> validate("bench", {"bench": str})
    Traceback (most recent call last):
    ValueError: it must be an object, got 'bench'
    """
    if wrong := _misfit(value, schema, ""):
        raise ValueError(wrong)
    return value


def _misfit(value: Any, schema: Any, name: str) -> str | None:
    """What is wrong with a value of this name, None where nothing is."""
    if isinstance(schema, tuple):
        found = [_misfit(value, one, name) for one in schema]
        return None if None in found else found[0]
    kind = schema if isinstance(schema, type) else type(schema)
    kinds: tuple[type[Any], ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return f"{name or 'it'} must be {_WORDS.get(kind)}, got {value!r:.40}"
    if schema is float and not -math.inf < value < math.inf:
        return f"{name or 'it'} must be finite, got {value}"
    if isinstance(schema, list):
        parts = [_misfit(item, schema[0], f"{name}[{place}]") for place, item in enumerate(value)]
    elif isinstance(schema, dict):
        inner = dict.fromkeys(value, schema[...]) if ... in schema else schema
        parts = [_misfit(value.get(key), one, f"{name}.{key}".removeprefix(".")) for key, one in inner.items()]
    else:
        parts = []
    return next(filter(None, parts), None)
