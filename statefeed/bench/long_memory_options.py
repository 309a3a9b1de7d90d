"""Options of the tasks of long memory: ``statefeed bench adding``, ``recall`` and ``digits``."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import statefeed as sf
from statefeed.bench.long_memory_cells import LAYERS
from statefeed.bench.options import OptionError, Options, names, option, rules_of

DIGIT_LENGTHS = (64, 256, 1024)  # pixels of a digit of 8 x 8, and enlarged to 16 x 16 and 32 x 32
_OUTPUT = "JSONL file of the records, overwritten; the figure is written next to it"
_RULES = "feedback rules and schedules, separated by commas; gate is skipped for an rnn, which has no gate"


def _default_rules(length: int) -> str:
    horizon = f"log_spaced({length})"
    return f"bptt,dsf,{horizon},{horizon}@0.6/bptt"


@dataclass(frozen=True)
class LongMemoryOptions(Options):
    """Options of every task of long memory."""

    fewest: ClassVar[int] = 3
    task: ClassVar[str]
    smoke_length: ClassVar[int] = 6

    repeats: int = option(5, "seeds of the initial weights and the sequences, at least 3")
    cells: str = option(
        "gru", f"among {', '.join(LAYERS)}, separated by commas; lstm-forget-1 has a forget-gate bias of 1"
    )
    rules: str = option(_default_rules(200), _RULES)
    length: int = option(200, "steps of a sequence, at least 2")
    width: int = option(64, "units of the cell")
    steps: int = option(1500, "training steps")
    rates: str = option(
        "2e-3,4e-3,8e-3",
        "learning rates, separated by commas; every cell and rule trains at its best, chosen with seed 0; where that "
        "is the lowest or highest, another by a factor of two is tried, at most twice; a single rate is used as it is",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fewest in (("length", 2), ("width", 1), ("steps", 1)):
            if getattr(self, name) < fewest:
                raise OptionError(f"{name} must be at least {fewest}, got {getattr(self, name)}")
        if not all(0 < rate < float("inf") for rate in rates_of(self)):
            raise OptionError(f"rates must be finite and above 0, got {self.rates!r}")
        for cell in names("cells", self.cells, tuple(LAYERS)):
            if not schedules_of(cell, self):
                raise OptionError(f"rules must include one that an {cell} supports, got {self.rules!r}: it has no gate")


@dataclass(frozen=True)
class AddingOptions(LongMemoryOptions):
    """Long memory: the sum of two marked numbers of a long sequence (the adding problem)."""

    task: ClassVar[str] = "adding"

    output: str = option("adding.jsonl", _OUTPUT)


@dataclass(frozen=True)
class RecallOptions(LongMemoryOptions):
    """Long memory: the first symbol of a long sequence."""

    task: ClassVar[str] = "recall"

    output: str = option("recall.jsonl", _OUTPUT)


@dataclass(frozen=True)
class DigitsOptions(LongMemoryOptions):
    """Long memory: a handwritten digit read pixel by pixel; needs scikit-learn, which includes the digits."""

    task: ClassVar[str] = "digits"
    smoke_length: ClassVar[int] = DIGIT_LENGTHS[0]

    rules: str = option(_default_rules(1024), _RULES)
    length: int = option(1024, "pixels of a digit: 64 (8 x 8, as scikit-learn has it), or enlarged 256 or 1024")
    steps: int = option(3000, "training steps")
    output: str = option("digits.jsonl", _OUTPUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length not in DIGIT_LENGTHS:
            raise OptionError(f"length must be among {', '.join(map(str, DIGIT_LENGTHS))}, got {self.length}")
        if importlib.util.find_spec("sklearn") is None:
            raise OptionError('digits needs scikit-learn, which is not installed: pip install "statefeed[examples]"')


def rates_of(options: LongMemoryOptions) -> list[float]:
    """The learning rates of the grid.

    Raises:
        OptionError: a word that is not a number.
    """
    try:
        return [float(word) for word in options.rates.split(",")]
    except ValueError:
        raise OptionError(f"rates must be numbers separated by commas, got {options.rates!r}") from None


def schedules_of(cell: str, options: LongMemoryOptions) -> list[str]:
    """The rules and schedules that a cell supports.

    Raises:
        OptionError: an invalid spelling.
    """
    found = []
    for word in (word.strip() for word in options.rules.split(",")):
        try:
            rules = [str(rule) for _, rule in sf.Schedule(word).stages]
        except ValueError as error:
            raise OptionError(f"rules: {error}") from None
        if all(rules_of(cell, rule) for rule in rules):
            found.append(word)
    return found
