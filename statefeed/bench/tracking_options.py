"""Options of ``statefeed bench tracking``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from statefeed.bench.options import OptionError, Options, names, option, rules_of

BASELINES = ("mingru", "s4d")  # cells with exact gradients only
CELLS = ("rnn", "gru", "lstm", "slstm", *BASELINES)


@dataclass(frozen=True)
class TrackingOptions(Options):
    """State tracking: parity of a bit string, trained at one length and held out at twice that length."""

    fewest: ClassVar[int] = 3

    repeats: int = option(3, "seeds of the initial weights and the strings, at least 3")
    cells: str = option("gru,slstm,mingru,s4d", f"among {', '.join(CELLS)}, separated by commas")
    rules: str = option(
        "bptt,ft-bptt,dsf,gate,gate+1,jacobian,calibrated",
        f"feedback rules, separated by commas; {' and '.join(BASELINES)} have exact gradients only",
    )
    length: int = option(30, "bits of a string in training, a multiple of --every")
    every: int = option(6, "bits after which the parity is asked for")
    width: int = option(64, "units of the cell")
    steps: int = option(1600, "training steps")
    output: str = option("tracking.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "every", "width", "steps"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length % self.every:
            raise OptionError(f"length must be a multiple of every, {self.every}, got {self.length}")
        for cell in names("cells", self.cells, CELLS):
            if cell not in BASELINES and not rules_of(cell, self.rules):
                raise OptionError(f"rules must include one that an {cell} supports, got {self.rules!r}: it has no gate")
