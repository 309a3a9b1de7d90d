"""Owns what runs say: a run folder read as one result, results told apart by task and rule, and their table."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import statefeed as sf
from statefeed.lm import config
from statefeed.lm.config import RECURRENT, UsageError
from statefeed.lm.run import checkpoint
from statefeed.lm.run.log import PHASES
from statefeed.lm.run.schema import checked

Item = TypeVar("Item")

# What may differ between the runs of one task, which are compared with each other, besides where and how they are kept.
VARIED = ("train.seed", "train.lr", "train.alignment", "model.feedback")

# What a run's rows and a comparison's records hold, as far as it is read here.
_ROW = {"split": str, "step": int, "epoch": int, "seconds": float, "peak_bytes": (float, None)}
_ROWS = {
    "train": {**_ROW, "tokens_per_s": float, **{f"{phase}_ms": (float, None) for phase in PHASES}},
    "valid": {**_ROW, "perplexity": float},
    "test": {**_ROW, "perplexity": float},
    "alignment": {**_ROW, "cosine": math.nan, "norm_ratio": math.nan},
}
_RESULT = {
    "config": {...: {}},
    "facts": {"parameters": int, "splits": ({...: {"sha256": str}}, None)},
    "outcome": str,
    "valid": [{"step": int, "epochs": float, "seconds": float, "perplexity": float}],
    "alignment": [{"step": int, "epochs": float, "cosine": math.nan, "norm_ratio": math.nan}],
    "ms": {...: float},
    "tokens_per_s": (float, None),
    "peak_bytes": (float, None),
    "test": (float, None),
}
_RECIPE = {
    "model": {"cell": str, "layers": int, "width": int, "feedback": (str, float)},
    "train": {"lr": float, "seed": int},
    "run": {"dir": str},
}


@dataclass(frozen=True)
class Result:
    """One run, as it stands in a comparison's records, one JSON object a line.

    Args:
        config: the recipe with every key, by section.
        facts: the run's record: corpus, parameters, machine, threads, versions.
        outcome: finished, diverged or unfinished.
        valid: one row an evaluation: step, epochs (a fraction of one where it is known), seconds and perplexity. The
            seconds are those of training, evaluations left out, where the run has timed its steps.
        alignment: one row an evaluation at which the rule was not exact: step, epochs, cosine and norm_ratio of the
            gradient of one fixed training batch against exact BPTT.
        ms: milliseconds of one step by phase, medians over the run, of a schedule the mean over its steps of the
            medians of its rules; empty where the run has not timed them.
        tokens_per_s: of training, the median over the run.
        peak_bytes: the most memory that the run's process held in the steps before its first evaluation, so that every
            rule is measured over the same ones; a schedule tells of its first stage. None where it is not known.
        test: perplexity of the best weights on the test split, None where there is none.
    """

    config: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    outcome: str
    valid: list[dict[str, float]]
    alignment: list[dict[str, float]]
    ms: dict[str, float]
    tokens_per_s: float | None
    peak_bytes: float | None
    test: float | None

    def get(self, key: str) -> Any:
        """The value of section.key in the recipe."""
        section, _, name = key.partition(".")
        return self.config[section][name]

    @property
    def rule(self) -> str:
        """The feedback rule in its usual spelling; the cell, where it has none."""
        cell = self.get("model.cell")
        return str(sf.Schedule(self.get("model.feedback"))) if cell in RECURRENT else str(cell)

    @property
    def best(self) -> float | None:
        """The best validation perplexity; None before the first evaluation and for a run that diverged."""
        if self.outcome == "diverged" or not self.valid:
            return None
        return min(row["perplexity"] for row in self.valid)

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of one step."""
        return sum(self.ms.values()) if self.ms else None

    def reach(self, perplexity: float) -> dict[str, float] | None:
        """The first evaluation at which this perplexity was reached, None where it never was."""
        return next((row for row in self.valid if row["perplexity"] <= perplexity), None)


def of_run(folder: Path, outcome: str | None = None) -> Result:
    """The result in a run folder, whether its run has ended or not.

    Args:
        folder: that `statefeed train` left.
        outcome: how it ended; None takes what the folder tells.

    Raises:
        UsageError: when it is no run folder or a file in it cannot be read.
    """
    if not (folder / checkpoint.CONFIG).is_file():
        raise UsageError(f"{folder} is not a run folder: it holds no {checkpoint.CONFIG}")
    recipe = dataclasses.asdict(config.load(folder / checkpoint.CONFIG))
    facts, rows = checkpoint.record(folder), _rows(folder / checkpoint.METRICS)
    place = _places(rows, facts)
    by_split: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": [], "alignment": []}
    for row in rows:
        by_split[row["split"]].append(row)
    train, valid = by_split["train"], by_split["valid"]
    last = max((row["step"] for row in rows), default=0)
    length = facts.get("steps_per_epoch")
    steps = recipe["train"]["steps"] or (length and length * recipe["train"]["epochs"]) or last
    if outcome is None:
        ended = bool(valid) and valid[-1]["step"] >= steps
        outcome = "diverged" if "diverged" in facts else "finished" if ended else "unfinished"
    speeds = [row["tokens_per_s"] for row in train]
    # The peak only rises, and an evaluation may take more than a step: under some rules it runs exact BPTT as well.
    own = itertools.takewhile(lambda row: row["split"] == "train", rows)
    peaks = [row["peak_bytes"] for row in own if row.get("peak_bytes") is not None]
    return Result(
        config=recipe,
        facts=facts,
        outcome=outcome,
        valid=[{**place(row), "perplexity": row["perplexity"]} for row in valid],
        alignment=[
            {**place(row), "cosine": row["cosine"], "norm_ratio": row["norm_ratio"]} for row in by_split["alignment"]
        ],
        ms=_step_ms(train, recipe["model"]["feedback"], steps),
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
            row = checked(json.loads(line), {"split": str})
            if row["split"] not in _ROWS:
                raise ValueError(f"split must be {', '.join(_ROWS)}, got {row['split']!r:.40}")
            rows.append(checked(row, _ROWS[row["split"]]))
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
    """Whether the rows of the training split tell the time of every phase."""
    return bool(train) and all(row.get(f"{phase}_ms") is not None for row in train for phase in PHASES)


def _places(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Where a row lies: step, epochs and seconds of training.

    The time of a step is the sum of its phases, each row of the training split standing for the steps since the one
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
        """Training seconds until a step, which may lie within the steps of one row or behind the last."""
        last, until, each = next((entry for entry in trained if entry[0] >= step), trained[-1])
        return until + (step - last) * each

    def place(row: dict[str, Any]) -> dict[str, float]:
        step, length = row["step"], facts.get("steps_per_epoch")
        return {
            "step": step,
            "epochs": step / length if length else row["epoch"],
            "seconds": round(seconds(step), 3) if timed else row["seconds"],
        }

    return place


def from_line(line: str) -> Result:
    """The result that one line of a comparison's records holds; keys younger than the line have their defaults.

    Raises:
        ValueError: when it is none, saying why.
    """
    read = checked(json.loads(line), _RESULT)
    result = Result(**{item.name: read.get(item.name) for item in dataclasses.fields(Result)})
    defaults = dataclasses.asdict(config.Config())
    recipe = {section: {**keys, **result.config.get(section, {})} for section, keys in defaults.items()}
    result = dataclasses.replace(result, config=checked(recipe, _RECIPE))
    sf.Schedule(result.get("model.feedback"))  # which refuses a rule that does not exist
    return result


def to_line(result: Result) -> str:
    """The result as one line."""
    return json.dumps(dataclasses.asdict(result)) + "\n"


# Side by side --------------------------------------------------------------------------------------------------------


def flat(recipe: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A recipe by section.key."""
    return {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}


def split(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """The items by a key, in the order of their first appearance."""
    parts: dict[str, list[Item]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return parts


def tasks(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by what they have in common but for rule, rate and seed, each task under a title that tells it."""
    titled: dict[str, list[Result]] = {}
    for same in split(results, _title).values():
        parts = list(split(same, lambda result: json.dumps(setting(result), sort_keys=True)).values())
        settings = [setting(part[0]) for part in parts]
        differing = [
            key
            for key in dict.fromkeys(key for one in settings for key in one)
            if len({json.dumps(one.get(key)) for one in settings}) > 1
        ]
        for part, one in zip(parts, settings, strict=True):
            titled[_title(part[0]) + "".join(f", {key}={one.get(key)}" for key in differing)] = part
    return titled


def setting(result: Result, *varied: str) -> dict[str, Any]:
    """What a result must have in common with others to be compared with them.

    It is the recipe by section.key but for rule, rate, seed and where and how the run is kept, and the device. Of
    the text it is what was read, wherever it lay; of records that do not tell, its name and place.

    Args:
        result: of any task.
        varied: keys of the recipe that may differ, too.
    """
    splits = result.facts.get("splits")
    text = "/".join(found["sha256"][:8] for found in splits.values()) if splits else result.facts.get("corpus")
    left_out = (*VARIED, *varied, *(["data.path"] if splits else []))
    kept = {key: value for key, value in recipe(result).items() if key not in left_out}
    return {"text": text, "device": result.facts.get("device", "cpu"), **kept}


def recipe(result: Result) -> dict[str, Any]:
    """The recipe of a result by section.key, but for where and how the run is kept."""
    return {key: value for key, value in flat(result.config).items() if not key.startswith("run.")}


def size(result: Result) -> str:
    """The model in short, such as gru 1x256."""
    return f"{result.get('model.cell')} {result.get('model.layers')}x{result.get('model.width')}"


def _title(result: Result) -> str:
    length = (
        f"{result.get('train.steps')} steps" if result.get("train.steps") else f"{result.get('train.epochs')} epochs"
    )
    return f"{result.facts.get('corpus')}, {size(result)} {result.get('model.block')}, {length}"


def by_rule(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of one rule, over their seeds; a rule that was run at several rates appears once for each."""
    rates: dict[str, set[float]] = {}
    for result in results:
        rates.setdefault(result.rule, set()).add(result.get("train.lr"))

    def label(result: Result) -> str:
        return result.rule + (f" at {result.get('train.lr'):g}" if len(rates[result.rule]) > 1 else "")

    return split(results, label)


def standing(results: Sequence[Result]) -> list[Result]:
    """The runs that count: those that are finished, while there are none those under way; none that diverged."""
    finished = [result for result in results if result.outcome == "finished"]
    return finished or [result for result in results if result.outcome == "unfinished"]


def bests(results: Sequence[Result]) -> list[float]:
    """The best validation perplexities of the runs that count."""
    return [result.best for result in standing(results) if result.best is not None]


def at_best_rate(results: Sequence[Result]) -> list[Result]:
    """The runs of one rule at that learning rate whose mean is best."""
    rates = split(results, lambda result: str(result.get("train.lr"))).values()
    return min(rates, key=lambda group: statistics.mean(bests(group) or [math.inf]))


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The comparison of the rules of one task: headings, and one row a rule, the perplexity first for narrow screens.

    Perplexities, milliseconds and memory are means over the seeds, the perplexity with its standard deviation. Cosine
    and norm ratio are means over the evaluations at which the rule was not exact.
    Targets are met seed by seed: the perplexity at the last evaluation of ft-bptt, and of exact bptt, with the same
    seed, each at its best rate.

    Args:
        results: of one task.
    """
    groups = by_rule(results)
    rules = split(results, lambda result: result.rule)
    rivals = {rule: at_best_rate(rules[rule]) for rule in ("ft-bptt", "bptt", "fused-bptt") if rule in rules}
    tested = any(result.test is not None for result in results)
    headings = ["rule", "valid perplexity", "rate", "seeds", *(["test perplexity"] if tested else [])]
    headings += ["forward ms", "backward ms", "step ms", "peak MiB"]
    headings += [f"{what} to {rule}" for rule in rivals for what in ("epochs", "seconds")]
    headings += ["cosine with BPTT", "norm ratio"]
    rows = []
    for label, group in groups.items():
        row = [
            label,
            _spread(bests(group)),
            f"{group[0].get('train.lr'):g}",
            _seeds(group),
            *([_spread([run.test for run in standing(group) if run.test is not None])] if tested else []),
            _mean([result.ms.get("forward") for result in group], ".1f"),
            _mean([result.ms.get("backward") for result in group], ".1f"),
            _mean([result.step_ms for result in group], ".1f"),
            _mean([result.peak_bytes / 2**20 if result.peak_bytes else None for result in group], ",.0f"),
        ]
        for rival in rivals.values():
            reached = _reached(group, rival)
            row += [_times(reached, "epochs"), _times(reached, "seconds")]
        rows.append([*row, _aligned(group, "cosine"), _aligned(group, "norm_ratio")])
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


def _aligned(group: Sequence[Result], what: str) -> str:
    """The mean over the evaluations at which the rule was not exact, with their number where that is not all."""
    runs = [result for result in group if result.alignment]
    if not runs:
        return "-"
    mean = statistics.mean(statistics.mean(row[what] for row in run.alignment) for run in runs)
    inexact, scored = sum(len(run.alignment) for run in runs), sum(len(run.valid) for run in runs)
    return f"{mean:.3f}" + (f" ({inexact} of {scored})" if inexact < scored else "")


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
