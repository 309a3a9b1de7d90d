"""Records of the tasks of long memory by cell and rule: rate, score, and when it was solved."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from statefeed.lm.compare.measurements import Record

HEADINGS = ("rate", "median (min to max)", "solved by", "steps to solved", "CPU seconds to solved")


def metric(record: Record) -> str:
    """The key of the score: error, the lower the better, or accuracy.

    Example:
        >>> metric({"error": None}), metric({"accuracy": 0.5})
        ('error', 'accuracy')
    """
    return "error" if "error" in record else "accuracy"


def as_score(value: float | None, metric: str) -> float:
    """A score of a record; for training that diverged the worst one.

    Example:
        >>> as_score(0.5, "error"), as_score(None, "error"), as_score(None, "accuracy")
        (0.5, inf, 0.0)
    """
    if value is None or math.isnan(value):
        return math.inf if metric == "error" else 0.0
    return value


def cases(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records grouped by cell and rule, the best rule of a cell first.

    A seed that was run again, with more learning rates, counts once, and the rates of both runs were tried.

    Args:
        records: of one task and one length, the later of two with the same seed last.

    Returns:
        Records by cell and rule. A rule is better if it was solved by a larger part of its seeds, then if it was solved
        sooner, then by its score.
    """
    found: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    for record in records:
        seeds = found[record["cell"], record["variant"]]
        before = seeds.get(record["seed"], {})
        seeds[record["seed"]] = {**record, "rates": {**before.get("rates", {}), **record.get("rates", {})}}
    runs = {case: list(seeds.values()) for case, seeds in found.items()}
    return dict(sorted(runs.items(), key=lambda item: (item[0][0], *_order(item[1]))))


def _order(runs: Sequence[Record]) -> tuple[float, float, float]:
    steps, score = _solved(runs, "learnt"), statistics.median(_scores(runs))
    better = score if metric(runs[0]) == "error" else -score
    return -len(steps) / len(runs), statistics.mean(steps) if steps else 0.0, better


def row(runs: Sequence[Record]) -> list[str]:
    """The cells of a table under ``HEADINGS``.

    Args:
        runs: one record per seed of a cell and rule.
    """
    scores, steps, seconds = _scores(runs), _solved(runs, "learnt"), _solved(runs, "cpu_seconds")
    median, low, high = (
        f"{score:.{4 if metric(runs[0]) == 'error' else 3}f}"
        for score in (statistics.median(scores), min(scores), max(scores))
    )
    return [
        _rate(runs[0]),
        f"{median} ({low} to {high})",
        f"{len(steps)} of {len(runs)}",
        f"{statistics.mean(steps):,.0f}" if steps else "-",
        f"{statistics.mean(seconds):,.0f}" if seconds else "-",
    ]


def _rate(record: Record) -> str:
    """The learning rate, and whether it is the lowest or highest of those tried."""
    tried = [float(rate) for rate in record.get("rates", {})]
    edge = bool(tried) and record["lr"] in (min(tried), max(tried))
    return f"{record['lr']:g}{' (edge)' if edge else ''}"


def _scores(runs: Sequence[Record]) -> list[float]:
    return [as_score(r[metric(r)], metric(r)) for r in runs]


def _solved(runs: Sequence[Record], key: str) -> list[float]:
    """The values of a key in the seeds that solved the task."""
    return [r[key] for r in runs if r["learnt"] is not None]
