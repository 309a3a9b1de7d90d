"""Owns how a benchmark is asked for: each option a dataclass field and a flag, checked once, here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch

V = TypeVar("V")

FEWEST_REPEATS = 5


class OptionError(ValueError):
    """A mistake of the user's, told in one sentence; ``statefeed bench`` turns it into exit code 2."""


def option(default: V, help: str) -> V:
    """A dataclass field with its default and the one line that documents it, here and in ``--help``."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """What every benchmark takes."""

    repeats: int = option(
        9, "repetitions, at least 5, what is compared taking turns; medians and spreads are over them"
    )
    threads: int | None = option(None, "threads of torch; null is torch's own choice")
    device: Literal["cpu", "cuda"] = option("cpu", "where it runs")
    smoke: bool = option(False, "tiny shapes, one repetition: shows that it runs, not how fast")
    output: str = option(
        "bench.jsonl", "the records, one JSON object a line, replaced if there; the figure goes beside"
    )

    def __post_init__(self) -> None:
        if self.repeats < FEWEST_REPEATS:
            raise OptionError(
                f"repeats must be at least {FEWEST_REPEATS} for a median and a spread, got {self.repeats}"
            )
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads must be at least 1, got {self.threads}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("device must be cpu here, got cuda: torch sees no GPU")
        if Path(self.output).suffix != ".jsonl":
            raise OptionError(f"output must name a .jsonl file, got {self.output!r}")
        if not Path(self.output).parent.is_dir():
            raise OptionError(f"output must lie in a folder that exists, got {self.output!r}")

    @property
    def rounds(self) -> int:
        """Repetitions that are in fact made."""
        return 1 if self.smoke else self.repeats


class Shape(NamedTuple):
    """T steps, B sequences, H features of the state and of the input."""

    T: int
    B: int
    H: int

    def __str__(self) -> str:
        return f"{self.T}x{self.B}x{self.H}"


def names(flag: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """Comma-separated words.

    Raises:
        OptionError: a word that is not allowed, or none at all.

    Example:
        >>> names("cells", "gru,lstm", ("rnn", "gru", "lstm"))
        ['gru', 'lstm']
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in allowed:
            raise OptionError(f"{flag} must be among {', '.join(allowed)}, separated by commas, got {word!r}")
    return words


def numbers(flag: str, text: str) -> list[int]:
    """Comma-separated whole numbers of at least 1, in ascending order.

    Raises:
        OptionError: anything else.

    Example:
        >>> numbers("steps", "256,64")
        [64, 256]
    """
    try:
        values = sorted({int(word) for word in text.split(",")})
    except ValueError:
        values = [0]
    if values[0] < 1:
        raise OptionError(f"{flag} must be whole numbers of at least 1, separated by commas, got {text!r}")
    return values


def shapes(text: str) -> list[Shape]:
    """Comma-separated TxBxH.

    Raises:
        OptionError: anything else.

    Example:
        >>> shapes("64x32x256")
        [Shape(T=64, B=32, H=256)]
    """
    result = []
    for word in text.split(","):
        try:
            shape = Shape(*(int(size) for size in word.split("x")))
        except (TypeError, ValueError):
            shape = Shape(0, 0, 0)
        if min(shape) < 1:
            raise OptionError(f"shapes must be TxBxH, separated by commas, such as 64x32x256, got {word!r}")
        result.append(shape)
    return list(dict.fromkeys(result))
