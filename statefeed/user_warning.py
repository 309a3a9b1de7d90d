"""Warnings that point at the line of the user's program, however deep in this package they arise."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import torch

_INSIDE = tuple(os.path.join(os.path.dirname(path), "") for path in (__file__, torch.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning, with the attribute ``of_statefeed``, at the first line outside this package and torch.

    Args:
        message: what the user should know.
        category: its class.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("look here")
        >>> caught[0].message.of_statefeed
        True
    """
    if torch.compiler.is_compiling():  # which traces this function, but neither frames nor new classes
        warnings.warn(message, category, stacklevel=1)
    else:
        warning = category(message)
        warning.of_statefeed = True  # type: ignore[attr-defined]
        warnings.warn(warning, stacklevel=_level())


def _level() -> int:
    """How many frames of ``warn`` and of what called it are inside."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
        level += 1
    return level
