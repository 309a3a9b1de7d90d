"""A run folder read as one result."""

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

# What a run's rows hold, as far as it is read here.
_ROW = {"split": str, "step": int, "epoch": int, "seconds": float, "peak_bytes": (float, None)}
_ROWS = {
    "train": {**_ROW, "tokens_per_s": float, **{f"{phase}_ms": (float, None) for phase in PHASES}},
    "valid": {**_ROW, "perplexity": float},
    "test": {**_ROW, "perplexity": float},
    "alignment": {**_ROW, "cosine": math.nan, "norm_ratio": math.nan},
}


def read_run(folder: Path, outcome: str | None = None) -> Result:
    """The result in a run folder, whether its run has ended or not.

    Args:
        folder: of a run.
        outcome: how it ended; None takes what the folder says.

    Raises:
        UsageError: when it is no run folder or a file in it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not a run folder: it holds no {CONFIG}")
    config = dataclasses.asdict(recipe.load(folder / CONFIG))
    try:
        identity.check_rules(config["model"]["cell"], config["model"]["feedback"])
    except ValueError as error:
        raise UsageError(f"{folder / CONFIG} cannot be read: {error}") from None
    record, rows = metadata.read(folder), _rows(folder / METRICS)
    place = _places(rows, record)
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
    # The peak only rises, and an evaluation may take more than a step: under some rules it runs exact BPTT as well.
    own = itertools.takewhile(lambda row: row["split"] == "train", rows)
    peaks = [row["peak_bytes"] for row in own if row.get("peak_bytes") is not None]
    return Result(
        config=config,
        metadata=record,
        outcome=outcome,
        valid=[{**place(row), "perplexity": row["perplexity"]} for row in valid],
        alignment=[
            {**place(row), "cosine": row["cosine"], "norm_ratio": row["norm_ratio"]} for row in by_split["alignment"]
        ],
        ms=_step_ms(train, config["model"]["feedback"], steps),
        tokens_per_s=statistics.median(speeds) if speeds else None,
        peak_bytes=max(peaks, default=None),
        test=next((row["perplexity"] for row in by_split["test"]), None),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, but for a last one that a killed run left without its end."""
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
    """Milliseconds of a step by phase: the median under each rule of a schedule, for as many steps as it holds."""
    if not _timed(train):
        return {}
    rules = sf.Schedule(feedback)
    stages = split(train, lambda row: str(rules.at((row["step"] - 1) / steps))).values()
    return {
        phase: sum(len(stage) * statistics.median(row[f"{phase}_ms"] for row in stage) for stage in stages) / len(train)
        for phase in PHASES
    }


def _timed(train: Sequence[dict[str, Any]]) -> bool:
    """Whether the rows of the training split have the time of every phase."""
    return bool(train) and all(row.get(f"{phase}_ms") is not None for row in train for phase in PHASES)


def _places(rows: Sequence[dict[str, Any]], record: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """The step, epochs and seconds of training of a row.

    The time of a step is the sum of its phases, each row of the training split valid_runs for the steps since the one
    before; without phases it is the time since the beginning of the run, evaluations included.
    """
    train = [row for row in rows if row["split"] == "train"]
    timed = _timed(train)
    trained: list[tuple[int, float, float]] = []  # last step, seconds until then, seconds of one step
    before, total = 0, 0.0
    for row in train if timed else []:
        each = 1e-3 * sum(row[f"{phase}_ms"] for phase in PHASES)
        total += (row["step"] - before) * each
        before = row["step"]
        trained.append((before, total, each))

    def seconds(step: int) -> float:
        """Training seconds until a step, which may be within the steps of one row or after the last."""
        last, until, each = next((entry for entry in trained if entry[0] >= step), trained[-1])
        return until + (step - last) * each

    def place(row: dict[str, Any]) -> dict[str, float]:
        step, length = row["step"], record.get("steps_per_epoch")
        return {
            "step": step,
            "epochs": step / length if length else row["epoch"],
            "seconds": round(seconds(step), 3) if timed else row["seconds"],
        }

    return place
