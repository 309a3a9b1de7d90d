"""The difference of a rule to the baseline over paired seeds, its 95% interval, and the verdict that follows."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from statefeed.lm import identity
from statefeed.lm.compare.pairs import Pairs, pair
from statefeed.lm.compare.rates import Grid, choose
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.student import quantile
from statefeed.lm.compare.tasks import split
from statefeed.lm.config import RECURRENT
from statefeed.lm.errors import UsageError

LEVEL = 0.95
FEWEST_PAIRS = 3
SCORES = ("best validation", "last evaluation", "test")


class Terms(NamedTuple):
    """What is asked of a comparison.

    Attributes:
        baseline: the rule that others are compared with, in canonical spelling.
        within: None for the verdicts better and worse; a part of the baseline's perplexity for the claim that a rule's
            is at most this much above it, which holds or does not hold.
    """

    baseline: str = "bptt"
    within: float | None = None


DEFAULT_TERMS = Terms()


def terms(baseline: str, percent: float | None) -> Terms:
    """What the flags of a command ask.

    Args:
        baseline: a rule, or a schedule of rules.
        percent: `within` in percent.

    Raises:
        UsageError: there is no such rule.
    """
    try:
        rule = identity.rule(RECURRENT[0], baseline)
    except ValueError as error:
        raise UsageError(f"--baseline {baseline}: {error}") from error
    return Terms(rule, None if percent is None else percent / 100)


class Difference(NamedTuple):
    """Differences of the logarithms of two perplexities, by pair of runs.

    Attributes:
        logs: log(perplexity of the rule / perplexity of the baseline) by pair; inf, -inf or NaN where a run diverged.
    """

    logs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the pairs."""
        return statistics.fmean(self.logs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean by Student's t; None with fewer than three pairs, or if a run diverged.

        >>> low, high = Difference((0.1, 0.2, 0.3)).interval
        >>> round(low, 4), round(high, 4)
        (-0.0484, 0.4484)
        """
        count = len(self.logs)
        if count < FEWEST_PAIRS or not all(map(math.isfinite, self.logs)):
            return None
        reach = quantile(LEVEL, count - 1) * statistics.stdev(self.logs) / math.sqrt(count)
        return self.mean - reach, self.mean + reach

    def verdict(self, within: float | None = None) -> str:
        """What follows from the interval.

        Without a claim: "worse" if the whole interval is above zero, "better" if it is below, else "not decided".
        With the claim that the perplexity is at most `within` above the baseline's: "holds" if the whole interval is
        at most that, "does not hold" if it is above, else "not decided". "no verdict" with fewer than three pairs.

        >>> Difference((0.1, 0.12, 0.11)).verdict(), Difference((0.1, 0.12)).verdict()
        ('worse', 'no verdict')
        >>> Difference((0.1, 0.12, 0.11)).verdict(0.05), Difference((0.1, 0.12, 0.11)).verdict(0.2)
        ('does not hold', 'holds')
        """
        if len(self.logs) < FEWEST_PAIRS:
            return "no verdict"
        if self.interval is None:
            return "not decided"
        low, high = self.interval
        if within is not None:
            limit = math.log1p(within)
            return "holds" if high <= limit else "does not hold" if low > limit else "not decided"
        return "better" if high < 0 else "worse" if low > 0 else "not decided"


class Comparison(NamedTuple):
    """One rule, or one model, against the baseline.

    Attributes:
        name: of the rule, in canonical spelling, or of the model.
        grid: its learning rates, and the one at which it is compared.
        pairs: its runs with those of the baseline.
        differences: by name of the score; the test split only where every pair has a score of it.
    """

    name: str
    grid: Grid
    pairs: Pairs
    differences: dict[str, Difference]


class Verdicts(NamedTuple):
    """The rules of one task, or models that were trained alike, against the baseline.

    Attributes:
        terms: what was asked.
        grid: the learning rates of the baseline, and the one at which it is compared.
        runs: of the baseline at that rate.
        comparisons: the other rules, or the other models.
        kind: what is compared, the heading of its column.
    """

    terms: Terms
    grid: Grid
    runs: list[Result]
    comparisons: list[Comparison]
    kind: str = "rule"

    @property
    def decidable(self) -> bool:
        """Whether one has enough pairs for a verdict."""
        return any(len(one.pairs.runs) >= FEWEST_PAIRS for one in self.comparisons)

    @property
    def scores(self) -> list[str]:
        """The names of the scores that one of them has."""
        return [name for name in SCORES if any(name in one.differences for one in self.comparisons)]


def compare_rules(same: Sequence[Result], terms: Terms, every: Sequence[Result] = ()) -> Verdicts | None:
    """Every rule of one task, at its own best learning rate, against the baseline; None if there is nothing to compare.

    Args:
        same: the runs of one task.
        terms: what is asked.
        every: runs of any task, in which the rates of shorter runs are looked for.
    """
    rules = split(same, lambda result: result.rule)
    if terms.baseline not in rules or len(rules) < 2:
        return None
    return compare_groups(rules, terms, every)


def compare_groups(
    groups: Mapping[str, Sequence[Result]], terms: Terms, every: Sequence[Result], kind: str = "rule"
) -> Verdicts:
    """Every group of runs, at its own best learning rate, against that of the baseline.

    Args:
        groups: runs by rule, or by model.
        terms: what is asked; the baseline is one of the groups.
        every: runs of any task, in which the rates of shorter runs are looked for.
        kind: what a group is.
    """
    grid = choose(groups[terms.baseline], every)
    baseline = _at(groups[terms.baseline], grid.chosen)
    found = []
    for name, runs in groups.items():
        if name != terms.baseline:
            own = choose(runs, every)
            pairs = pair(_at(runs, own.chosen), baseline)
            found.append(Comparison(name, own, pairs, _differences(pairs)))
    return Verdicts(terms, grid, baseline, found, kind)


def _at(runs: Sequence[Result], rate: float) -> list[Result]:
    return [result for result in runs if result.get("train.lr") == rate]


def score(result: Result, name: str) -> float | None:
    """The perplexity of a run by the name of the score: inf for a diverged run, None without such a score."""
    if result.outcome == "diverged":
        return math.inf
    if name == "test":
        return result.test
    return result.best if name == "best validation" or not result.valid else result.valid[-1]["perplexity"]


def _differences(pairs: Pairs) -> dict[str, Difference]:
    found = {}
    tested = any(result.test is not None for both in pairs.runs for result in both)
    for name in SCORES if tested else SCORES[:2]:
        scores = [(score(rule, name), score(baseline, name)) for rule, baseline in pairs.runs]
        known = [(ours, other) for ours, other in scores if ours is not None and other is not None]
        if known and len(known) == len(scores):
            found[name] = Difference(tuple(_log_ratio(*both) for both in known))
    return found


def _log_ratio(ours: float, other: float) -> float:
    """log(ours / other), of perplexities that may be infinite.

    >>> _log_ratio(2.0, 1.0) == math.log(2), _log_ratio(math.inf, 1.0), _log_ratio(math.inf, math.inf)
    (True, inf, nan)
    """
    return math.log(ours) - math.log(other)
