"""Records of benchmarks by machine, how they are named, and Markdown tables."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from statefeed.lm.compare.results import Result
from statefeed.lm.compare.sources import Found

FEWEST_REPEATS = 5  # fewer are a trial
PTB = "ptb-gru-1x256"  # the recipe of `statefeed bench training`, and the only one of older records

Record = dict[str, Any]  # of a benchmark
# Milliseconds of a training step by rule, by `step_key` and place.
StepTimes = dict[tuple[tuple[Any, ...], str], dict[str, float]]


def measurements(found: Found, bench: str, fewest: int = FEWEST_REPEATS) -> dict[str, list[Record]]:
    """The records of one benchmark by the heading of their table: machine, threads and torch; trials are left out.

    Args:
        found: the records.
        bench: the name of the benchmark.
        fewest: the smallest number of repeats of a record that is not a trial.
    """
    measured = defaultdict(list)
    for r in found.benchmarks:
        if r["bench"] == bench and r["repeats"] >= fewest:
            threads = f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}"
            measured[f"{machine(r)}, {threads}, torch {r['versions']['torch']}"].append(r)
    return dict(sorted(measured.items()))


def machine(record: Record) -> str:
    """The GPU or the processor."""
    return str(record["machine"]["gpu"] or record["machine"]["cpu"])


def newest(item: tuple[str, Sequence[Record]]) -> str:
    """When the last record of a heading was measured."""
    return max(str(r["date"]) for r in item[1])


def instructions(records: Iterable[Record]) -> str:
    """Which instruction set the fused kernels were compiled for, in words."""
    descriptions = (r["kernels"]["forward"] for r in records if r.get("kernels"))
    matches = (re.search(r"for (\S+),", words) for words in descriptions)
    return next((f", kernels for {match[1]}" for match in matches if match), "")


def kind(record: Mapping[str, Any]) -> str:
    """What a record of layers is besides one layer of one direction, dense and in training; "" for that.

    Example:
        >>> kind({"layers": 2, "packed": True}), kind({"T": 3})
        ('2 layers packed', '')
    """
    words = [f"{record['layers']} layers"] if record.get("layers", 1) > 1 else []
    words += [word for word in ("bidirectional", "packed") if record.get(word)]
    words += ["forward"] if record.get("pass", "training") == "forward" else []
    return " ".join(words)


def place(record: Mapping[str, Any]) -> str:
    """The shape of a record of layers, and its kind.

    Example:
        >>> place({"T": 9, "B": 2, "H": 4, "packed": True})
        '9x2x4 packed'
    """
    return f"{record['T']}x{record['B']}x{record['H']} {kind(record)}".rstrip()


def step_key(result: Result) -> tuple[Any, ...]:
    """What the time of a step depends on, as `step_times` has it."""
    keys = ("model.cell", "model.layers", "model.width", "train.batch", "train.context", "train.precision")
    return tuple(result.get(key) for key in keys)


def step_times(found: Found) -> StepTimes:
    """Milliseconds of a step by rule, by `step_key` and place: measured in turns by `statefeed bench training`."""
    times: StepTimes = defaultdict(dict)
    for heading, records in measurements(found, "training").items():
        place, _, _ = heading.rpartition(", torch ")
        for r in records:
            if r["implementation"] == "statefeed":
                key = tuple(r[part] for part in ("cell", "layers", "width", "batch", "context", "dtype"))
                times[key, place][r["variant"]] = r["step_ms"]["median"]
    return times


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
