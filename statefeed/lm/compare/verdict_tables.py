"""Verdicts as tables and sentences, for a terminal, the page and Markdown."""

import math
import statistics
from collections.abc import Sequence

from statefeed.lm.compare.tasks import best_scores
from statefeed.lm.compare.verdicts import FEWEST_PAIRS, Comparison, Difference, Terms, Verdicts

TOO_FEW = f"no verdict, fewer than {FEWEST_PAIRS} pairs of runs with one seed and program"

_SHORT = {"best validation": "best", "last evaluation": "last", "test": "test"}


def percent(log: float) -> str:
    """A difference of logarithms as a relative difference in percent.

    >>> percent(math.log(1.103)), percent(math.log(0.995)), percent(math.log(5)), percent(math.inf)
    ('+10.3', '-0.50', '+400', 'infinite')
    """
    if not math.isfinite(log):
        return "infinite"
    value = 100 * math.expm1(log)
    size = abs(value)
    return format(value, f"+.{2 if size < 0.995 else 1 if size < 99.95 else 0}f")


def describe(difference: Difference) -> str:
    """A difference with its interval, in percent.

    >>> describe(Difference((0.09, 0.1, 0.11))), describe(Difference((0.09, 0.11)))
    ('+10.5% (+7.8 to +13.3)', '+10.5%')
    >>> describe(Difference((0.09, math.inf, 0.11)))
    '1 diverged'
    """
    diverged = sum(not math.isfinite(log) for log in difference.logs)
    if diverged:
        return f"{diverged} diverged"
    middle = f"{percent(difference.mean)}%"
    if difference.interval is None:
        return middle
    low, high = map(percent, difference.interval)
    return f"{middle} ({low} to {high})"


def title(terms: Terms) -> str:
    """What the tables show."""
    asked = "" if terms.within is None else f", at most {100 * terms.within:g}% above it"
    return f"difference to {terms.baseline}{asked}: 95% interval over seeds"


def short_table(found: Verdicts) -> tuple[list[str], list[list[str]]]:
    """One row for every rule and score, as wide as 80 characters: headings and rows."""
    headings = [found.kind, "score", "pairs", "difference, 95% interval", "verdict"]
    rows = []
    for one in found.comparisons:
        count = str(len(one.pairs.runs))
        scored = [name for name in found.scores if name in one.differences]
        for k, name in enumerate(scored):
            difference = one.differences[name]
            first = (one.name, _SHORT[name], count) if k == 0 else ("", _SHORT[name], "")
            rows.append([*first, describe(difference), difference.verdict(found.terms.within)])
        if not scored:
            rows.append([one.name, "-", count, "-", "no verdict"])
    return headings, rows


def table(found: Verdicts) -> tuple[list[str], list[list[str]]]:
    """One row for every rule with all scores, the baseline first: headings and rows.

    A perplexity is the mean of the best validation perplexities at the chosen rate, over the seeds.
    """
    scores = found.scores or ["best validation"]
    headings = [found.kind, "rate", "pairs", "perplexity", *scores]
    middle = [best for best in best_scores(found.runs) if math.isfinite(best)]
    rows = [
        [found.terms.baseline, _rate(found.grid.chosen, found.grid.at_edge), "", _mean(middle), *("" for _ in scores)]
    ]
    for one in found.comparisons:
        own = best_scores([run for run, _ in one.pairs.runs])
        cells = [_cell(one, name, found.terms) for name in scores]
        rows.append([one.name, _rate(one.grid.chosen, one.grid.at_edge), str(len(one.pairs.runs)), _mean(own), *cells])
    return headings, rows


def _cell(one: Comparison, name: str, terms: Terms) -> str:
    difference = one.differences.get(name)
    if difference is None:
        return "-"
    return f"{describe(difference)}: {difference.verdict(terms.within)}"


def _rate(rate: float, at_edge: bool) -> str:
    return f"{rate:g}{' (edge)' * at_edge}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f}" if values else "-"


def notes(found: Verdicts) -> list[str]:
    """What must be known to read the tables: rates, seeds without a pair, the rule of the verdicts."""
    sentences = []
    grids: dict[str, list[str]] = {}
    for name, grid in [(found.terms.baseline, found.grid), *((one.name, one.grid) for one in found.comparisons)]:
        grids.setdefault(grid.describe(), []).append(name)
    sentences += [f"Rate of {', '.join(names)}: {grid}." for grid, names in grids.items()]
    omitted: dict[str, list[str]] = {}
    for one in found.comparisons:
        if one.pairs.omitted:
            omitted.setdefault("; ".join(one.pairs.omitted), []).append(one.name)
    sentences += [f"Without a pair, {', '.join(names)}: {why}." for why, names in omitted.items()]
    dirty = any(run.metadata.get("dirty") for one in found.comparisons for both in one.pairs.runs for run in both)
    if dirty:
        sentences.append("Some runs had uncommitted changes: their commit does not identify the program.")
    intervals = sum(d.interval is not None for one in found.comparisons for d in one.differences.values())
    if intervals > 1:
        sentences.append(
            f"{intervals} intervals of 95% each, not corrected for their number: about one in 20 misses the truth."
        )
    return sentences
