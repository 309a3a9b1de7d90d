"""The choice of a rule's learning rate, from a grid on shorter runs or from the runs that are compared."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from statefeed.lm.compare.results import Result
from statefeed.lm.compare.tasks import setting, split

# The keys in which a shorter run of the same training differs.
_LENGTH = ("train.epochs", "train.steps", "train.evaluations", "train.decay", "train.decay_after", "train.decay_every")


class Grid(NamedTuple):
    """The rates of one rule, and which of them was chosen.

    Attributes:
        rates: from low to high.
        best: the rate with the lowest perplexity.
        chosen: the rate at which the rule is compared.
        steps: length of the runs of the grid, where they are shorter than those compared; else None.
    """

    rates: tuple[float, ...]
    best: float
    chosen: float
    steps: int | None

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the lowest or the highest of several."""
        return len(self.rates) > 1 and self.chosen in (self.rates[0], self.rates[-1])

    def describe(self) -> str:
        """The grid in words.

        >>> Grid((1e-3, 2e-3), 2e-3, 2e-3, None).describe()
        '0.002 of 0.001, 0.002, chosen on these runs, AT THE EDGE'
        >>> Grid((1e-3,), 1e-3, 1e-3, None).describe()
        '0.001, the only one'
        """
        if len(self.rates) == 1:
            return f"{self.chosen:g}, the only one"
        place = "these runs" if self.steps is None else f"runs of {self.steps:,} steps"
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        words = f"{self.chosen:g} of {rates}, chosen on {place}"
        if self.chosen != self.best:
            return f"{words}, BUT {self.best:g} IS BEST THERE and was not run"
        return words + (", AT THE EDGE" if self.at_edge else "")


def choose(runs: Sequence[Result], every: Sequence[Result] = ()) -> Grid:
    """The grid of a rule's rates and the chosen one: that with the lowest mean of the best validation perplexities.

    The runs themselves decide if they have several rates, since one that is best after a third of the steps may be too
    high for all of them; else shorter runs of the same rule and training, the grid with the most rates. Rates are
    compared over the seeds that all of them have, if there are such seeds, and the worst is left out until one remains:
    of two good rates with five seeds each and a bad one with a single seed, all five decide between the two.

    Args:
        runs: all runs of one rule and task.
        every: runs of any task, in which shorter ones are looked for.
    """
    grid, steps = _by_rate(runs), None
    own = set(grid)
    if len(own) == 1:
        shorter = [result for result in every if _is_shorter(result, runs[0])]
        for group in split(shorter, lambda result: str(setting(result))).values():
            found = _by_rate(group)
            if len(found) > 1 and (len(found), _steps(group[0])) > (len(grid), steps or 0):
                grid, steps = found, _steps(group[0])
    best = _best(grid)
    return Grid(tuple(grid), best, best if best in own else min(own), steps)


def at_best_rate(runs: Sequence[Result]) -> list[Result]:
    """The runs of one rule and task at the rate that is best among them."""
    chosen = choose(runs).chosen if runs else None
    return [result for result in runs if result.get("train.lr") == chosen]


def _is_shorter(result: Result, run: Result) -> bool:
    """Whether a run has ended and is a shorter one of the same rule and training as another run."""
    if result.rule != run.rule or result.outcome == "unfinished":
        return False
    return _steps(result) < _steps(run) and setting(result, *_LENGTH) == setting(run, *_LENGTH)


def _steps(result: Result) -> int:
    """Steps of the whole run by its recipe; where the record does not have the length of an epoch, those evaluated."""
    length = result.metadata.get("steps_per_epoch")
    steps: int | None = result.get("train.steps") or (length and length * result.get("train.epochs"))
    return steps or int(max((row["step"] for row in result.valid), default=0))


def _by_rate(runs: Sequence[Result]) -> dict[float, list[Result]]:
    """The runs that have ended by rate, from low to high; all runs if none has."""
    ended = [result for result in runs if result.outcome != "unfinished"] or runs
    rates: dict[float, list[Result]] = {}
    for result in sorted(ended, key=lambda result: float(result.get("train.lr"))):
        rates.setdefault(result.get("train.lr"), []).append(result)
    return rates


def _best(grid: dict[float, list[Result]]) -> float:
    left = dict(grid)
    while len(left) > 1:
        common = set.intersection(*({result.get("train.seed") for result in group} for group in left.values()))
        scores = {rate: _score(group, common) for rate, group in left.items()}
        # Of equal rates the higher one is left out.
        del left[max(reversed(scores), key=scores.__getitem__)]
    (rate,) = left
    return rate


def _score(group: Sequence[Result], seeds: set[int]) -> float:
    """Mean of the best validation perplexities over these seeds, or over all if none; inf if a run diverged."""
    perplexities = [math.inf if result.best is None else result.best for result in group]
    if math.inf in perplexities:
        return math.inf
    of = zip(perplexities, group, strict=True)
    return statistics.mean(value for value, result in of if not seeds or result.get("train.seed") in seeds)
