"""Options of the benchmarks: dataclass fields that are also flags, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch

V = TypeVar("V")

FEWEST_REPEATS = 5


class OptionError(ValueError):
    """Invalid option; ``statefeed bench`` prints the message and exits with code 2."""


def option(default: V, help: str) -> V:
    """A dataclass field with its default and its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Options of every benchmark."""

    repeats: int = option(
        9, "repetitions, at least 5; contenders are interleaved, and medians and spreads are over repetitions"
    )
    threads: int | None = option(None, "torch threads; null for torch's default")
    device: Literal["cpu", "cuda"] = option("cpu", "device")
    smoke: bool = option(False, "tiny shapes and one repetition, to check that the benchmark runs")
    output: str = option("bench.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

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
            raise OptionError(f"output must be in an existing folder, got {self.output!r}")

    @property
    def rounds(self) -> int:
        """Repetitions of this run."""
        return 1 if self.smoke else self.repeats


class Shape(NamedTuple):
    """T steps, B sequences, H features of the state and of the input."""

    T: int
    B: int
    H: int

    def __str__(self) -> str:
        return f"{self.T}x{self.B}x{self.H}"


def names(flag: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """Parse comma-separated words.

    Raises:
        OptionError: no word, or a word that is not allowed.

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
    """Parse comma-separated integers of at least 1; returns them in ascending order.

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
        raise OptionError(f"{flag} must be integers of at least 1, separated by commas, got {text!r}")
    return values


def shapes(text: str) -> list[Shape]:
    """Parse comma-separated shapes TxBxH.

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
