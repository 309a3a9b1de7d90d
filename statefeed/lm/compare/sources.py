"""Reader of files and folders: results of runs and records of benchmarks."""

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

# The main metric of a benchmark is the first of these keys that its record has.
MAIN = ("tokens_per_s", "ms", "peak_bytes")
_SPREAD = {"median": float, "min": float, "max": float}
_BENCHMARK = {
    "bench": str,
    "command": (str, None),
    "machine": ({}, None),
    "versions": ({}, None),
    **dict.fromkeys(MAIN, (_SPREAD, None)),
}

_READ_ELSEWHERE = ("paths", "custom", "pararnn", "newton-training")  # records that documents quote by hand


@dataclass
class Found:
    """The results and benchmark records in some paths."""

    results: list[Result] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.results or self.benchmarks)

    def add(self, other: "Found") -> None:
        """Add the content of another path."""
        self.results += other.results
        self.benchmarks += other.benchmarks


def read(paths: Iterable[Path]) -> Found:
    """Read run folders, comparison folders, folders of these, and JSONL files.

    A run or file that cannot be read is skipped with a notice on stderr.

    Raises:
        UsageError: a path is missing or holds no such file, or none of them can be read.
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
    # Remove duplicates: a run may be in its folder, in the records of a comparison and in a copy of these.
    copies = split(found.results, lambda result: f"{identity.select(result.config, 'task', 'run')} {result.valid}")
    found.results = [group[0] for group in copies.values()]
    return found


def _entry(path: Path, wrong: list[UsageError]) -> Found:
    """The content of a file or folder; errors of unreadable files are appended to `wrong`."""
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
            if "stage" in record or "package" in record or record.get("bench") in _READ_ELSEWHERE:
                continue  # "stage": statefeed/bench/gpu.sh; "package": other people's packages
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
    """Validate the keys of a benchmark record that its table and bars use; raises ValueError."""
    validate(record, _BENCHMARK)
    for name in MAIN:
        if (spread := record.get(name)) and not spread["min"] <= spread["median"] <= spread["max"]:
            raise ValueError(f"{name} must have its median between min and max, got {spread}")
    return record
