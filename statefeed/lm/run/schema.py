"""Validation of JSON values against a schema."""

import math
from typing import Any

_WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


def validate(value: Any, schema: Any) -> Any:
    """Check a value against a schema and return it.

    Args:
        value: a value read from JSON.
        schema: str, int, float (a finite number or an integer), or math.nan (any number); {key: schema} for an object
            with at least these keys; {...: schema} for an object whose values all match; [schema] for a list; a tuple
            of alternative schemas, with None for a value that may be null or missing.

    Returns:
        The value.

    Raises:
        ValueError: the value does not match; the message names the position.

    >>> validate({"step": 3, "more": []}, {"step": float, "loss": (float, None)})
    {'step': 3, 'more': []}
    >>> validate({"valid": [{"step": 3}, {"step": "x"}]}, {"valid": [{"step": float}]})
    Traceback (most recent call last):
    ValueError: valid[1].step must be a number, got 'x'
    >>> validate("bench", {"bench": str})
    Traceback (most recent call last):
    ValueError: it must be an object, got 'bench'
    """
    if wrong := _mismatch(value, schema, ""):
        raise ValueError(wrong)
    return value


def _mismatch(value: Any, schema: Any, name: str) -> str | None:
    """Why a value of this name does not match a schema; None if it does."""
    if isinstance(schema, tuple):
        found = [_mismatch(value, one, name) for one in schema]
        return None if None in found else found[0]
    kind = schema if isinstance(schema, type) else type(schema)
    kinds: tuple[type[Any], ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return f"{name or 'it'} must be {_WORDS.get(kind)}, got {value!r:.40}"
    if schema is float and not -math.inf < value < math.inf:
        return f"{name or 'it'} must be finite, got {value}"
    if isinstance(schema, list):
        parts = [_mismatch(item, schema[0], f"{name}[{place}]") for place, item in enumerate(value)]
    elif isinstance(schema, dict):
        inner = dict.fromkeys(value, schema[...]) if ... in schema else schema
        parts = [_mismatch(value.get(key), one, f"{name}.{key}".removeprefix(".")) for key, one in inner.items()]
    else:
        parts = []
    return next(filter(None, parts), None)
