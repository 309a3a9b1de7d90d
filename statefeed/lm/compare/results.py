"""The result of one run, and the line of a comparison's records that holds it."""

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
    """One run; a comparison's records hold one JSON object a line for each.

    Args:
        config: the recipe with every key, by section.
        metadata: the run's record: corpus, parameters, machine, threads, versions.
        outcome: finished, diverged or unfinished.
        valid: one row an evaluation: step, epochs (a fraction of one where it is known), seconds and perplexity. The
            seconds are those of training, evaluations left out, where the run has timed its steps.
        alignment: one row an evaluation at which the rule was not exact: step, epochs, cosine and norm_ratio of the
            gradient of one fixed training batch against exact BPTT.
        ms: milliseconds of one step by phase, medians over the run, of a schedule the mean over its steps of the
            medians of its rules; empty where the run has not timed them.
        tokens_per_s: of training, the median over the run.
        peak_bytes: the most memory that the run's process held in the steps before its first evaluation, so that every
            rule is measured over the same ones; of a schedule, those of its first rule. None where it is not known.
        test: perplexity of the best weights on the test split, None where there is no test split.
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
        """The feedback rule in its usual spelling; the cell, where it has none."""
        return identity.rule(self.get("model.cell"), self.get("model.feedback"))

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


def from_line(line: str) -> Result:
    """The result that one line of a comparison's records holds; keys younger than the line have their defaults.

    Raises:
        ValueError: when it holds no result, saying why.
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
    """The result as one line."""
    return json.dumps({"version": migration.VERSION, **dataclasses.asdict(result)}) + "\n"
