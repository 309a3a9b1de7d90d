"""Reader of a run folder as a ``Result``."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import statefeed as sf
from statefeed.lm import identity, migration, recipe
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.tasks import split
from statefeed.lm.errors import UsageError
from statefeed.lm.run import metadata
from statefeed.lm.run.files import CONFIG, METRICS
from statefeed.lm.run.phases import PHASES
from statefeed.lm.run.schema import validate

# Keys of the rows of metrics.jsonl that are read here.
_ROW = {"split": str, "step": int, "epoch": int, "seconds": float, "peak_bytes": (float, None)}
_ROWS = {
    "train": {**_ROW, "tokens_per_s": float, **{f"{phase}_ms": (float, None) for phase in PHASES}},
    "valid": {**_ROW, "perplexity": float},
    "test": {**_ROW, "perplexity": float},
    "alignment": {**_ROW, "cosine": math.nan, "norm_ratio": math.nan},
}


def read_run(folder: Path, outcome: str | None = None) -> Result:
    """Read the result of a finished or unfinished run.

    Args:
        folder: the run folder.
        outcome: outcome of the run; None determines it from the folder.

    Raises:
        UsageError: the folder is not a run folder, or a file in it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not a run folder: it holds no {CONFIG}")
    config = dataclasses.asdict(recipe.load(folder / CONFIG))
    try:
        identity.check_rules(config["model"]["cell"], config["model"]["feedback"])
    except ValueError as error:
        raise UsageError(f"{folder / CONFIG} cannot be read: {error}") from None
    record, rows = metadata.read(folder), _rows(folder / METRICS)
    position = _positions(rows, record)
    by_split: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": [], "alignment": []}
    for row in rows:
        by_split[row["split"]].append(row)
    train, valid = by_split["train"], by_split["valid"]
    last = max((row["step"] for row in rows), default=0)
    length = record.get("steps_per_epoch")
    steps = config["train"]["steps"] or (length and length * config["train"]["epochs"]) or last
    if outcome is None:
        ended = bool(valid) and valid[-1]["step"] >= steps
        outcome = "diverged" if "diverged" in record else "finished" if ended else "unfinished"
    speeds = [row["tokens_per_s"] for row in train]
    # The peak never decreases, and an evaluation may need more than a step: with train.alignment it runs exact BPTT.
    before_evaluation = itertools.takewhile(lambda row: row["split"] == "train", rows)
    peaks = [row["peak_bytes"] for row in before_evaluation if row.get("peak_bytes") is not None]
    return Result(
        config=config,
        metadata=record,
        outcome=outcome,
        valid=[{**position(row), "perplexity": row["perplexity"]} for row in valid],
        alignment=[
            {**position(row), "cosine": row["cosine"], "norm_ratio": row["norm_ratio"]} for row in by_split["alignment"]
        ],
        ms=_step_ms(train, config["model"]["feedback"], steps),
        tokens_per_s=statistics.median(speeds) if speeds else None,
        peak_bytes=max(peaks, default=None),
        test=next((row["perplexity"] for row in by_split["test"]), None),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, without an incomplete last row of a killed run."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            row = migration.metrics_row(validate(json.loads(line), {"split": str}))
            if row["split"] not in _ROWS:
                raise ValueError(f"split must be {', '.join(_ROWS)}, got {row['split']!r:.40}")
            rows.append(validate(row, _ROWS[row["split"]]))
        except ValueError as error:
            raise UsageError(f"line {number} of {path} is no row of a run's metrics: {error}") from error
    return rows


def _step_ms(train: Sequence[dict[str, Any]], feedback: float | str, steps: int) -> dict[str, float]:
    """Milliseconds of a step by phase: the medians under each rule of a schedule, weighted by its number of rows."""
    if not _timed(train):
        return {}
    rules = sf.Schedule(feedback)
    stages = split(train, lambda row: str(rules.at((row["step"] - 1) / steps))).values()
    return {
        phase: sum(len(stage) * statistics.median(row[f"{phase}_ms"] for row in stage) for stage in stages) / len(train)
        for phase in PHASES
    }


def _timed(train: Sequence[dict[str, Any]]) -> bool:
    """Whether all training rows have the time of every phase."""
    return bool(train) and all(row.get(f"{phase}_ms") is not None for row in train for phase in PHASES)


def _positions(rows: Sequence[dict[str, Any]], record: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """A function that returns the step, epochs and seconds of training of a row.

    The time of a step is the sum of its phases. A training row holds the mean of the steps since the previous row.
    Without phases, seconds are the time since the start of the run, including evaluations.
    """
    train = [row for row in rows if row["split"] == "train"]
    timed = _timed(train)
    trained: list[tuple[int, float, float]] = []  # last step, seconds until then, seconds of one step
    before, total = 0, 0.0
    for row in train if timed else []:
        per_step = 1e-3 * sum(row[f"{phase}_ms"] for phase in PHASES)
        total += (row["step"] - before) * per_step
        before = row["step"]
        trained.append((before, total, per_step))

    def seconds(step: int) -> float:
        """Training seconds until a step, interpolated within a row and extrapolated after the last row."""
        last, until, per_step = next((entry for entry in trained if entry[0] >= step), trained[-1])
        return until + (step - last) * per_step

    def position(row: dict[str, Any]) -> dict[str, float]:
        step, length = row["step"], record.get("steps_per_epoch")
        return {
            "step": step,
            "epochs": step / length if length else row["epoch"],
            "seconds": round(seconds(step), 3) if timed else row["seconds"],
        }

    return position
