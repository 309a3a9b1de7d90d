"""Conversion of keys and rule names in files that older versions wrote to the current ones.

Version 2 of the results of a comparison renamed keys. A recipe has no version, and the metrics of a resumed run may
contain old and new names, so both are renamed key by key, which does not change a current file.

Before statefeed 0.2 the rule "bptt" was torch's own layer, now "torch", and "fused-bptt" is now "bptt". Since "bptt" is
a name in both versions, rules are converted according to the version in the metadata of their run or benchmark.
Version 3 of the results has current rule names for runs of every version. A recipe outside a run folder is current.
Checkpoints, weights and metrics contain no rules.
"""

import re
from collections.abc import Mapping
from typing import Any

from statefeed.lm.config import RECURRENT

VERSION = 3  # the current version of the results of a comparison

_RECIPE = {"train": {"restart": "state_reset_prob"}}
_RESULT = {"facts": "metadata"}
_PHASE = {"optimiser": "optimizer"}
_METRICS = {"optimiser_ms": "optimizer_ms"}
_LOG_STATE = {"laps": "phases"}
RULE_NAMES = {"bptt": "torch", "fused-bptt": "bptt"}
_NEW_RULES = (0, 2)  # the first version of statefeed with the current rule names


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}


def recipe(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with current keys.

    >>> recipe({"train": {"restart": 0.1, "lr": 1}})
    {'train': {'state_reset_prob': 0.1, 'lr': 1}}
    """
    return {
        section: _renamed(keys, _RECIPE.get(section, {})) if isinstance(keys, Mapping) else keys
        for section, keys in sections.items()
    }


def rule(spelling: float | str) -> float | str:
    """The current name of a rule, or schedule of rules, of a version before 0.2.

    >>> rule("bptt"), rule("dsf@0.3/fused-bptt"), rule("ft-bptt"), rule(0.5)
    ('torch', 'dsf@0.3/bptt', 'ft-bptt', 0.5)
    """
    if not isinstance(spelling, str):
        return spelling
    return re.sub(r"(?<![^/\s])(fused-bptt|bptt)(?![^/\s@+])", lambda found: RULE_NAMES[found[1]], spelling)


def _has_old_rules(version: object) -> bool:
    """Whether a version of statefeed, as in metadata, is before 0.2; a missing version counts as older."""
    found = re.match(r"(\d+)\.(\d+)", str(version))
    return found is None or (int(found[1]), int(found[2])) < _NEW_RULES


def run_recipe(sections: Mapping[str, Any], version: object) -> dict[str, Any]:
    """The recipe of a run with current rule names.

    Args:
        sections: the recipe with current keys.
        version: the version of statefeed that started the run.

    >>> run_recipe({"model": {"feedback": "bptt"}}, "0.1.0"), run_recipe({"model": {"feedback": "bptt"}}, "0.2.0")
    ({'model': {'feedback': 'torch'}}, {'model': {'feedback': 'bptt'}})
    """
    model = sections.get("model")
    if not _has_old_rules(version) or not isinstance(model, Mapping) or "feedback" not in model:
        return dict(sections)
    if model.get("cell", "gru") not in RECURRENT:  # "bptt" is the name for a cell without rules
        return dict(sections)
    return {**sections, "model": {**model, "feedback": rule(model["feedback"])}}


def result(values: Mapping[str, Any]) -> dict[str, Any]:
    """One result of a comparison, a line of compare.jsonl, in the current version."""
    version, found = values.get("version", 1), dict(values)
    if version == 1:
        found = _renamed(found, _RESULT)
        if isinstance(found.get("config"), Mapping):
            found["config"] = recipe(found["config"])
        if isinstance(found.get("ms"), Mapping):
            found["ms"] = _renamed(found["ms"], _PHASE)
    if version not in (1, 2):
        return found
    metadata = found.get("metadata")
    if isinstance(metadata, Mapping) and isinstance(found.get("config"), Mapping):
        found["config"] = run_recipe(found["config"], metadata.get("statefeed"))
    return {**found, "version": VERSION}


def benchmark(values: Mapping[str, Any]) -> dict[str, Any]:
    """One record of a benchmark with current rule names; the variants of torch.nn are settings, not rules."""
    versions = values.get("versions")
    known = versions.get("statefeed") if isinstance(versions, Mapping) else None
    if "variant" not in values or values.get("implementation") == "torch.nn" or not _has_old_rules(known):
        return dict(values)
    return {**values, "variant": rule(values["variant"])}


def metrics_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a run's metrics.jsonl with current keys."""
    return _renamed(values, _METRICS)


def log_state(values: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the log in a checkpoint with current keys; empty if the checkpoint has none."""
    found = _renamed(values, _LOG_STATE)
    return {**found, "phases": _renamed(found["phases"], _PHASE)} if "phases" in found else found


def tensor_file(metadata: Mapping[str, str]) -> str:
    """The JSON text in the metadata of a safetensors file that statefeed wrote; "" if it has none."""
    return metadata.get("metadata", metadata.get("facts", ""))
