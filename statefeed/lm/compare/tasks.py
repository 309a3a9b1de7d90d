"""Grouping of results by task, rule and learning rate."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from statefeed.lm import identity
from statefeed.lm.compare.results import Result

Item = TypeVar("Item")


def split(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Group items by a key, in the order of first appearance."""
    parts: dict[str, list[Item]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return parts


def tasks(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of every task by title; titles include the keys in which otherwise equal titles differ."""
    titled: dict[str, list[Result]] = {}
    for group in split(results, _title).values():
        parts = list(split(group, lambda result: json.dumps(setting(result), sort_keys=True)).values())
        settings = [setting(part[0]) for part in parts]
        differing = differing_keys(settings)
        for part, values in zip(parts, settings, strict=True):
            titled[_title(part[0]) + "".join(f", {key}={values.get(key)}" for key in differing)] = part
    return titled


def differing_keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys in which settings differ."""
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({json.dumps(values.get(key)) for values in settings}) > 1]


def setting(result: Result, *varied: str) -> dict[str, Any]:
    """The values that must be equal for two results to be compared: the task keys of the recipe, and the device.

    The text is identified by its digests, independently of its path; in records without digests, by name and path.

    Args:
        result: a result of any task.
        varied: further keys of the recipe that may differ.
    """
    splits = result.metadata.get("splits")
    text = "/".join(found["sha256"][:8] for found in splits.values()) if splits else result.metadata.get("corpus")
    excluded = (*varied, *(["data.path"] if splits else []))
    values = {key: value for key, value in identity.select(result.config, "task").items() if key not in excluded}
    return {"text": text, "device": result.metadata.get("device", "cpu"), **values}


def size(result: Result) -> str:
    """Cell and size of the model, such as gru 1x256."""
    return f"{result.get('model.cell')} {result.get('model.layers')}x{result.get('model.width')}"


def _title(result: Result) -> str:
    length = (
        f"{result.get('train.steps')} steps" if result.get("train.steps") else f"{result.get('train.epochs')} epochs"
    )
    return f"{result.metadata.get('corpus')}, {size(result)} {result.get('model.block')}, {length}"


def by_rule(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by rule, with all seeds; a rule with several learning rates has one entry per rate."""
    rates: dict[str, set[float]] = {}
    for result in results:
        rates.setdefault(result.rule, set()).add(result.get("train.lr"))

    def label(result: Result) -> str:
        return result.rule + (f" at {result.get('train.lr'):g}" if len(rates[result.rule]) > 1 else "")

    return split(results, label)


def valid_runs(results: Sequence[Result]) -> list[Result]:
    """The finished runs; if there are none, the unfinished ones. Diverged runs are left out."""
    finished = [result for result in results if result.outcome == "finished"]
    return finished or [result for result in results if result.outcome == "unfinished"]


def best_scores(results: Sequence[Result]) -> list[float]:
    """The best validation perplexities of the valid runs."""
    return [result.best for result in valid_runs(results) if result.best is not None]
