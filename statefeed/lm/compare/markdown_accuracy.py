"""Markdown tables of the benchmarks of accuracy: long memory and state tracking."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from statefeed.lm.compare.long_memory import HEADINGS, cases, metric, row
from statefeed.lm.compare.measurements import Record, measurements, table
from statefeed.lm.compare.sources import Found

_FEWEST = 3  # seeds
_TASKS = {"recall": "Recall of the first symbol", "adding": "Adding problem", "digits": "Digits pixel by pixel"}
_METRICS = {"error": "squared error", "accuracy": "accuracy"}


def long_memory(found: Found) -> str:
    """One table per task, machine and length; empty without records."""
    text = ""
    for task, title in _TASKS.items():
        for heading, records in measurements(found, task, _FEWEST).items():
            text += _recall_over_a_delay(heading, [r for r in records if "delay" in r])
            current = [r for r in records if "delay" not in r]
            for (T, H, steps), same in _grouped(current, "T", "H", "steps").items():
                rate, score, *others = HEADINGS
                head = ["cell, rule", rate, f"{_METRICS[metric(same[0])]}, {score}", *others]
                body = [[f"{cell} `{rule}`", *row(runs)] for (cell, rule), runs in cases(same).items()]
                place = f"{title}: {T:,} steps, {H} units, {steps:,} steps of training; {heading}"
                text += f"{place}.\n\n{table(head, body)}\n"
    return text


def _recall_over_a_delay(heading: str, records: Sequence[Record]) -> str:
    """The table of the earlier benchmark of recall: a GRU under one learning rate, without times."""
    text = ""
    for (delay, steps), same in _grouped(records, "delay", "steps").items():
        rules = sorted(_grouped(same, "variant").items(), key=lambda item: _sort_key(item[1]))
        body = [[f"`{rule}`", _over_seeds(runs, "accuracy"), *_learned(runs)] for (rule,), runs in rules]
        head = ["rule", "accuracy, mean over the seeds", "seeds that learned it", "at step"]
        text += (
            f"{_TASKS['recall']}: {delay} steps apart, a GRU of 64 units at the learning rate 0.01, {steps:,} steps of "
            f"training; {heading}.\n\n{table(head, body)}\n"
        )
    return text


def tracking(found: Found) -> str:
    """One table per machine and task of state tracking; empty without records."""
    text = ""
    for heading, records in measurements(found, "tracking", _FEWEST).items():
        for (T, every, H, steps), same in _grouped(records, "T", "every", "H", "steps").items():
            rules = sorted(_grouped(same, "cell", "variant").items(), key=lambda item: _sort_key(item[1]))
            body = [
                [
                    f"{cell} `{rule}`",
                    f"{runs[0]['lr']:g}",
                    _over_seeds(runs, "accuracy"),
                    _over_seeds(runs, "accuracy_twice"),
                    *_learned(runs),
                ]
                for (cell, rule), runs in rules
            ]
            head = ["cell, rule", "rate", f"{T} bits", f"{2 * T} bits", "seeds that learned it", "at step"]
            task = f"{T} bits, asked for after every {every}; {H} units, {steps:,} steps of training"
            text += f"{task}; {heading}.\n\n{table(head, body)}\n"
    return text


def _over_seeds(runs: Sequence[Record], key: str) -> str:
    """The mean over the seeds and its range."""
    values = [r[key] for r in runs]
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _learned(runs: Sequence[Record]) -> list[str]:
    """How many seeds learned a task, and after how many steps on average."""
    steps = [r["learnt"] for r in runs if r["learnt"] is not None]
    return [f"{len(steps)} of {len(runs)}", f"{statistics.mean(steps):,.0f}" if steps else "-"]


def _grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return groups


def _sort_key(records: Sequence[Record]) -> tuple[float, float, float]:
    """The order of rules: more seeds that learned it, then sooner, then accuracy."""
    learned = [r["learnt"] for r in records if r["learnt"] is not None]
    sooner = statistics.mean(learned) if learned else 0
    return -len(learned) / len(records), sooner, -statistics.mean(r["accuracy"] for r in records)
