"""What files and folders hold: results of runs and records of benchmarks."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from statefeed.lm import identity, migration
from statefeed.lm.compare.results import Result, from_line
from statefeed.lm.compare.run_result import read_run
from statefeed.lm.compare.tasks import split
from statefeed.lm.errors import UsageError, notify
from statefeed.lm.run.files import METRICS
from statefeed.lm.run.schema import validate

COMPARISON = "compare.jsonl"

# The main number of a benchmark is the first of these that it has.
MAIN = ("tokens_per_s", "ms", "peak_bytes")
_SPREAD = {"median": float, "min": float, "max": float}
_BENCHMARK = {
    "bench": str,
    "command": (str, None),
    "machine": ({}, None),
    "versions": ({}, None),
    **dict.fromkeys(MAIN, (_SPREAD, None)),
}


@dataclass
class Found:
    """What the paths hold."""

    results: list[Result] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)


def read(paths: Iterable[Path]) -> Found:
    """Everything that run folders, comparison folders, other folders of these and JSONL files hold.

    What cannot be read inside a folder is left out, with a sentence on stderr.

    Raises:
        UsageError: for a path that is missing or holds none of them, and for a file or run that is named and cannot be
            read.
    """
    found = Found()
    for path in paths:
        before = len(found.results) + len(found.benchmarks)
        if path.is_dir():
            _folder(path, found)
        elif path.is_file():
            _file(path, found)
        else:
            raise UsageError(f"there is no file or folder {path}: expected runs, comparisons or JSONL records")
        if len(found.results) + len(found.benchmarks) == before:
            raise UsageError(f"{path} holds no run, no {COMPARISON} and no records of a benchmark")
    # A run may be found in its folder, in a comparison's records and in a copy of these.
    same = split(found.results, lambda result: f"{identity.select(result.config, 'task', 'run')} {result.valid}")
    found.results = [group[0] for group in same.values()]
    return found


def _folder(folder: Path, found: Found) -> None:
    if (folder / METRICS).is_file():
        found.results.append(read_run(folder))
        return
    for path in sorted(folder.iterdir()):
        try:
            if path.is_file() and path.suffix == ".jsonl":
                _file(path, found)
            elif path.is_dir() and not (folder / COMPARISON).is_file():  # its records hold its runs
                _folder(path, found)
        except (UsageError, OSError) as error:
            notify(f"left out: {error}")


def _file(path: Path, found: Found) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: expected JSON objects, one a line") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = validate(json.loads(line), {})
            if "bench" in record:
                found.benchmarks.append(_benchmark_record(migration.benchmark(record)))
            else:
                found.results.append(from_line(line))
        except ValueError as error:
            raise UsageError(
                f"line {number} of {path} is no record of a comparison or a benchmark, one JSON object a line: {error}"
            ) from None


def _benchmark_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a benchmark as its table and bars need it; ValueError where it is not one."""
    validate(record, _BENCHMARK)
    for name in MAIN:
        if (spread := record.get(name)) and not spread["min"] <= spread["median"] <= spread["max"]:
            raise ValueError(f"{name} must have its median between min and max, got {spread}")
    return record
