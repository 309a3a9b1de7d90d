"""The result of one run, and its line in the records of a comparison."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import statefeed as sf
from statefeed.lm import identity, migration
from statefeed.lm.config import Config
from statefeed.lm.run.schema import validate

_RESULT = {
    "version": int,
    "config": {...: {}},
    "metadata": {"parameters": int, "splits": ({...: {"sha256": str}}, None)},
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
    """The result of one run; the records of a comparison have one JSON object per line for each.

    Args:
        config: the recipe with every key, by section.
        metadata: the record of the run: corpus, parameters, machine, threads, versions.
        outcome: finished, diverged or unfinished.
        valid: one row per evaluation: step, epochs (fractional if known), seconds and perplexity. Seconds are training
            time without evaluations, if the run has timed its steps.
        alignment: one row per evaluation under an approximate rule: step, epochs, cosine and norm_ratio of the gradient
            of one fixed training batch against exact BPTT.
        ms: milliseconds of one step by phase: medians over the run, under a schedule the mean over steps of the medians
            of its rules; empty if the run has not timed its steps.
        tokens_per_s: median speed of training in tokens per second.
        peak_bytes: peak memory of the run's process in the steps before its first evaluation, so that all rules are
            measured over the same steps (under a schedule, those of its first rule); None if unknown.
        test: perplexity of the best weights on the test split; None without a test split.
    """

    config: dict[str, dict[str, Any]]
    metadata: dict[str, Any]
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
        """The feedback rule in canonical spelling; the name of a cell that has no rule."""
        return identity.rule(self.get("model.cell"), self.get("model.feedback"))

    @property
    def best(self) -> float | None:
        """The best validation perplexity; None before the first evaluation, and for a diverged run."""
        if self.outcome == "diverged" or not self.valid:
            return None
        return min(row["perplexity"] for row in self.valid)

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of one step."""
        return sum(self.ms.values()) if self.ms else None

    def reach(self, perplexity: float) -> dict[str, float] | None:
        """The first evaluation with at most this perplexity; None if there is none."""
        return next((row for row in self.valid if row["perplexity"] <= perplexity), None)


def from_line(line: str) -> Result:
    """Parse one line of the records of a comparison; keys that are newer than the line have their defaults.

    Raises:
        ValueError: the line is not a valid result.
    """
    read = validate(migration.result(validate(json.loads(line), {})), _RESULT)
    if read["version"] > migration.VERSION:
        raise ValueError(f"version must be at most {migration.VERSION}, got {read['version']} of a newer statefeed")
    result = Result(**{item.name: read.get(item.name) for item in dataclasses.fields(Result)})
    defaults = dataclasses.asdict(Config())
    recipe = {section: {**keys, **result.config.get(section, {})} for section, keys in defaults.items()}
    result = dataclasses.replace(result, config=validate(recipe, _RECIPE))
    sf.Schedule(result.get("model.feedback"))  # raises for a rule that does not exist
    return result


def to_line(result: Result) -> str:
    """The result as one line of JSON."""
    return json.dumps({"version": migration.VERSION, **dataclasses.asdict(result)}) + "\n"
