"""The table that compares the rules of one task."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from statefeed.lm.compare.rates import at_best_rate
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.tasks import best_scores, by_rule, split, valid_runs


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The comparison of the rules of one task: headings, and one row per rule, the perplexity first for narrow screens.

    Perplexities, milliseconds and memory are means over the seeds, the perplexity with its standard deviation. Cosine
    and norm ratio are means over the evaluations at which the rule was not exact. The targets are the perplexities at
    the last evaluation of ft-bptt, and of the exact rules, with the same seed, each at its best rate.

    Args:
        results: of one task.
    """
    groups = by_rule(results)
    rules = split(results, lambda result: result.rule)
    rivals = {rule: at_best_rate(rules[rule]) for rule in ("ft-bptt", "bptt", "torch") if rule in rules}
    tested = any(result.test is not None for result in results)
    headings = ["rule", "valid perplexity", "rate", "seeds", *(["test perplexity"] if tested else [])]
    headings += ["forward ms", "backward ms", "step ms", "tokens/s", "peak MiB"]
    headings += [f"{what} to {rule}" for rule in rivals for what in ("epochs", "seconds")]
    headings += ["cosine with BPTT", "norm ratio"]
    rows = []
    for label, group in groups.items():
        row = [
            label,
            _spread(best_scores(group)),
            f"{group[0].get('train.lr'):g}",
            _seeds(group),
            *([_spread([run.test for run in valid_runs(group) if run.test is not None])] if tested else []),
            _mean([result.ms.get("forward") for result in group], ".1f"),
            _mean([result.ms.get("backward") for result in group], ".1f"),
            _mean([result.step_ms for result in group], ".1f"),
            _mean([result.tokens_per_s for result in group], ",.0f"),
            _mean([result.peak_bytes / 2**20 if result.peak_bytes else None for result in group], ",.0f"),
        ]
        for rival in rivals.values():
            reached = _reached(group, rival)
            row += [_times(reached, "epochs"), _times(reached, "seconds")]
        rows.append([*row, _aligned(group, "cosine"), _aligned(group, "norm_ratio")])
    return headings, rows


def short_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The columns of `table` that fit a terminal of 80 characters, with the seeds beside the perplexity."""
    headings = ["rule", "valid perplexity (seeds)", "ms a step", "norm ratio", "cosine"]
    rows = []
    for label, group in by_rule(results).items():
        step = _mean([result.step_ms for result in group], ".1f")
        perplexity = f"{_spread(best_scores(group))} ({_seeds(group)})"
        aligned = [_aligned(group, what, counted=False) for what in ("norm_ratio", "cosine")]
        rows.append([label, perplexity, step, *aligned])
    return headings, rows


def _reached(group: Sequence[Result], rival: Sequence[Result]) -> list[dict[str, float] | None]:
    """Where every run reached what the rival with its seed ended with."""
    ends = {
        run.get("train.seed"): run.valid[-1]["perplexity"] for run in rival if run.outcome == "finished" and run.valid
    }
    seeds = [(result, result.get("train.seed")) for result in group]
    return [result.reach(ends[seed]) for result, seed in seeds if seed in ends]


def _times(reached: Sequence[dict[str, float] | None], what: str) -> str:
    found = [row[what] for row in reached if row is not None]
    if not found:
        return "never" if reached else "-"
    some = f" ({len(found)} of {len(reached)})" if len(found) < len(reached) else ""
    return f"{statistics.mean(found):,.{0 if what == 'seconds' and max(found) >= 100 else 1}f}{some}"


def _aligned(group: Sequence[Result], what: str, counted: bool = True) -> str:
    """The mean over the evaluations at which the rule was not exact.

    Args:
        group: runs of one rule.
        what: cosine or norm_ratio.
        counted: whether the number of these evaluations follows where it is not all.
    """
    runs = [result for result in group if result.alignment]
    if not runs:
        return "-"
    mean = statistics.mean(statistics.mean(row[what] for row in run.alignment) for run in runs)
    inexact, scored = sum(len(run.alignment) for run in runs), sum(len(run.valid) for run in runs)
    return f"{mean:.3f}" + (f" ({inexact} of {scored})" if counted and inexact < scored else "")


def _seeds(group: Sequence[Result]) -> str:
    odd = [f"{count} {what}" for what in ("diverged", "unfinished") if (count := sum(r.outcome == what for r in group))]
    return ", ".join([str(len(group)), *odd])


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation.

    >>> _spread([1.0, 2.0, 3.0]), _spread([1.0]), _spread([])
    ('2.00 ± 1.00', '1.00', '-')
    """
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _mean(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.mean(known), form) if known else "-"


def format_value(value: Any) -> str:
    """A value for a table.

    >>> format_value(1234567), format_value(0.123456), format_value(12.3456), format_value(None), format_value("dsf")
    ('1,234,567', '0.123', '12.3', '-', 'dsf')
    """
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
