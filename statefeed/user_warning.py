"""Warnings that point at the line of the user's program, however deep in this package they arise."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import torch

_INSIDE = tuple(os.path.join(os.path.dirname(path), "") for path in (__file__, torch.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the first line outside this package and torch that led here.

    Args:
        message: what the user should know.
        category: its class.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn("look here")
        >>> caught[0].filename == __file__  # of this example, not of the function
        False
    """
    # torch.compile traces this function, but not frames.
    warnings.warn(message, category, stacklevel=1 if torch.compiler.is_compiling() else _level())


def _level() -> int:
    """How many frames of ``warn`` and of what called it are inside."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
        level += 1
    return level
