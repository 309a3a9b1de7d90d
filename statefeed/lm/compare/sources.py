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

    def __bool__(self) -> bool:
        return bool(self.results or self.benchmarks)

    def add(self, other: "Found") -> None:
        """Add what another path holds."""
        self.results += other.results
        self.benchmarks += other.benchmarks


def read(paths: Iterable[Path]) -> Found:
    """Everything that run folders, comparison folders, other folders of these and JSONL files hold.

    A run or file that cannot be read is left out, as a whole and with a sentence on stderr.

    Raises:
        UsageError: for a path that is missing or holds none of them, and where nothing can be read.
    """
    found, wrong = Found(), list[UsageError]()
    for path in paths:
        if not path.exists():
            raise UsageError(f"there is no file or folder {path}: expected runs, comparisons or JSONL records")
        before = len(wrong)
        more = _entry(path, wrong)
        if not more and len(wrong) == before:
            raise UsageError(f"{path} holds no run, no {COMPARISON} and no records of a benchmark")
        found.add(more)
    if not found and wrong:
        raise wrong[0]
    for error in wrong:
        notify(f"left out: {error}")
    # A run may be found in its folder, in a comparison's records and in a copy of these.
    same = split(found.results, lambda result: f"{identity.select(result.config, 'task', 'run')} {result.valid}")
    found.results = [group[0] for group in same.values()]
    return found


def _entry(path: Path, wrong: list[UsageError]) -> Found:
    """What a file or folder holds; what is wrong with those that cannot be read is added to `wrong`."""
    try:
        if path.is_file():
            return _file(path)
        if (path / METRICS).is_file():
            return Found([read_run(path)])
    except UsageError as error:
        wrong.append(error)
        return Found()
    found = Found()
    for inner in sorted(path.iterdir()):
        is_records = inner.is_file() and inner.suffix == ".jsonl"
        if is_records or (inner.is_dir() and not (path / COMPARISON).is_file()):  # its records hold its runs
            found.add(_entry(inner, wrong))
    return found


def _file(path: Path) -> Found:
    found = Found()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: expected JSON objects, one a line") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = validate(json.loads(line), {})
            if "package" in record:
                continue  # of other people's packages: their table is in docs/packages.md
            if "bench" in record:
                found.benchmarks.append(_benchmark_record(migration.benchmark(record)))
            else:
                found.results.append(from_line(line))
        except ValueError as error:
            raise UsageError(
                f"line {number} of {path} is no record of a comparison or a benchmark, one JSON object a line: {error}"
            ) from None
    return found


def _benchmark_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a benchmark as its table and bars need it; ValueError where it is not one."""
    validate(record, _BENCHMARK)
    for name in MAIN:
        if (spread := record.get(name)) and not spread["min"] <= spread["median"] <= spread["max"]:
            raise ValueError(f"{name} must have its median between min and max, got {spread}")
    return record
