"""Keys of older files: what was renamed on disk, so that every reader sees the names of today.

Version 2 of the results of a comparison came with these names. A recipe has no version, and the metrics of a run may
have been continued under newer names, so both are renamed key by key, which changes nothing in a file of today.
"""

from collections.abc import Mapping
from typing import Any

VERSION = 2  # of the results of a comparison, as written today

_RECIPE = {"train": {"restart": "state_reset_prob"}}
_RESULT = {"facts": "metadata"}
_PHASE = {"optimiser": "optimizer"}
_METRICS = {"optimiser_ms": "optimizer_ms"}
_LOG_STATE = {"laps": "phases"}


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}


def recipe(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a recipe.

    >>> recipe({"train": {"restart": 0.1, "lr": 1}})
    {'train': {'state_reset_prob': 0.1, 'lr': 1}}
    """
    return {
        section: _renamed(keys, _RECIPE.get(section, {})) if isinstance(keys, Mapping) else keys
        for section, keys in sections.items()
    }


def result(values: Mapping[str, Any]) -> dict[str, Any]:
    """One result of a comparison, a line of compare.jsonl."""
    if values.get("version", 1) != 1:
        return dict(values)
    found = _renamed(values, _RESULT)
    if isinstance(found.get("config"), Mapping):
        found["config"] = recipe(found["config"])
    if isinstance(found.get("ms"), Mapping):
        found["ms"] = _renamed(found["ms"], _PHASE)
    return {**found, "version": VERSION}


def metrics_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a run's metrics.jsonl."""
    return _renamed(values, _METRICS)


def log_state(values: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the log in a checkpoint; empty where there is none."""
    found = _renamed(values, _LOG_STATE)
    return {**found, "phases": _renamed(found["phases"], _PHASE)} if "phases" in found else found


def tensor_file(metadata: Mapping[str, str]) -> str:
    """The JSON text in the metadata of a safetensors file of ours; "" where there is none."""
    return metadata.get("metadata", metadata.get("facts", ""))
