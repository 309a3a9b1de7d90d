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
        scores: mean of the best validation perplexities by rate, from low to high; inf where a run diverged.
        chosen: the rate at which the rule is compared.
        steps: length of the runs in `scores`, where they are shorter than those compared; else None.
    """

    scores: dict[float, float]
    chosen: float
    steps: int | None

    @property
    def best(self) -> float:
        """The rate with the lowest perplexity."""
        return min(self.scores, key=self.scores.__getitem__)

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the lowest or the highest of several."""
        return len(self.scores) > 1 and self.chosen in (min(self.scores), max(self.scores))

    def describe(self) -> str:
        """The grid in words.

        >>> Grid({1e-3: 60.0, 2e-3: 50.0}, 2e-3, None).describe()
        '0.002 of 0.001, 0.002, chosen on these runs, AT THE EDGE'
        >>> Grid({1e-3: 60.0}, 1e-3, None).describe()
        '0.001, the only one'
        """
        if len(self.scores) == 1:
            return f"{self.chosen:g}, the only one"
        place = "these runs" if self.steps is None else f"runs of {self.steps:,} steps"
        rates = ", ".join(f"{rate:g}" for rate in self.scores)
        words = f"{self.chosen:g} of {rates}, chosen on {place}"
        if self.chosen != self.best:
            return f"{words}, BUT {self.best:g} IS BEST THERE and was not run"
        return words + (", AT THE EDGE" if self.at_edge else "")


def choose(runs: Sequence[Result], every: Sequence[Result] = ()) -> Grid:
    """The grid of a rule's rates and the chosen one: that with the lowest mean of the best validation perplexities.

    The runs themselves decide if they have several rates, since one that is best after a third of the steps may be too
    high for all of them; else shorter runs of the same rule and training, the grid with the most rates. Rates are
    compared over the seeds that all of them have, if there are such seeds.

    Args:
        runs: all runs of one rule and task.
        every: runs of any task, in which shorter ones are looked for.
    """
    own = _scores(runs)
    scores, steps = own, None
    if len(own) == 1:
        shorter = [result for result in every if _is_shorter(result, runs[0])]
        for group in split(shorter, lambda result: str(setting(result))).values():
            found = _scores(group)
            if len(found) > 1 and (len(found), _steps(group[0])) > (len(scores), steps or 0):
                scores, steps = found, _steps(group[0])
    chosen = min(scores, key=scores.__getitem__)
    return Grid(scores, chosen if chosen in own else min(own), steps)


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


def _scores(runs: Sequence[Result]) -> dict[float, float]:
    """Mean of the best validation perplexities by rate, from low to high."""
    ended = [result for result in runs if result.outcome != "unfinished"] or runs
    rates: dict[float, list[Result]] = {}
    for result in sorted(ended, key=lambda result: float(result.get("train.lr"))):
        rates.setdefault(result.get("train.lr"), []).append(result)
    common = set.intersection(*({result.get("train.seed") for result in group} for group in rates.values()))
    return {
        rate: statistics.mean(
            math.inf if result.best is None else result.best
            for result in group
            if not common or result.get("train.seed") in common
        )
        for rate, group in rates.items()
    }
