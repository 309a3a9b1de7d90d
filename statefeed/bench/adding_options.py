"""Options of ``statefeed bench adding``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import statefeed as sf
from statefeed.bench.options import OptionError, Options, names, option, rules_of

CELLS = ("rnn", "gru", "lstm")


@dataclass(frozen=True)
class AddingOptions(Options):
    """Long memory: the sum of two marked numbers of a long sequence (the adding problem)."""

    fewest: ClassVar[int] = 3

    repeats: int = option(5, "seeds of the initial weights and the sequences, at least 3")
    cells: str = option("gru", f"among {', '.join(CELLS)}, separated by commas")
    rules: str = option(
        "bptt,dsf,log_spaced(200),log_spaced(200)@0.6/bptt", "feedback rules and schedules, separated by commas"
    )
    length: int = option(200, "steps of a sequence, at least 2")
    width: int = option(64, "units of the cell")
    steps: int = option(1500, "training steps")
    rates: str = option("1e-3,2e-3,4e-3", "learning rates; every cell and rule trains at its best, chosen with seed 0")
    output: str = option("adding.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fewest in (("length", 2), ("width", 1), ("steps", 1)):
            if getattr(self, name) < fewest:
                raise OptionError(f"{name} must be at least {fewest}, got {getattr(self, name)}")
        if not all(rate > 0 for rate in rates_of(self)):
            raise OptionError(f"rates must be above 0, got {self.rates!r}")
        for cell in names("cells", self.cells, CELLS):
            if not schedules_of(cell, self):
                raise OptionError(f"rules must include one that an {cell} supports, got {self.rules!r}: it has no gate")


def rates_of(options: AddingOptions) -> list[float]:
    """The learning rates of the grid.

    Raises:
        OptionError: a word that is not a number.
    """
    try:
        return [float(word) for word in options.rates.split(",")]
    except ValueError:
        raise OptionError(f"rates must be numbers separated by commas, got {options.rates!r}") from None


def schedules_of(cell: str, options: AddingOptions) -> list[str]:
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
