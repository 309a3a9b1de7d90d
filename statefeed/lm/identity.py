"""Run identity: which keys of a recipe define the task, which vary between compared runs, which only say where it ran.

Every field of a recipe has one of three flags (`statefeed.lm.config.option`):

- task: the data, the model and the training procedure. Runs with equal task keys are compared with each other.
- run: keys that differ between the runs of a comparison: the rule, the learning rate, the seed.
- place: where and how a run is computed and saved. These keys change results by rounding errors at most, so a run can
  be resumed with other values.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import statefeed as sf
from statefeed.lm.config import RECURRENT, SECTIONS, Identity
from statefeed.lm.recipe import absolute

Recipe = Mapping[str, Mapping[str, Any]]  # the values by section and key


def keys(*identities: Identity) -> tuple[str, ...]:
    """The keys that have one of the given flags, as section.key.

    >>> keys("run")
    ('model.feedback', 'model.forward', 'train.seed', 'train.lr', 'train.alignment')
    """
    return tuple(key for key, identity in _flags() if identity in identities)


def _flags() -> list[tuple[str, Identity]]:
    return [
        (f"{section}.{item.name}", item.metadata["identity"])
        for section, kind in SECTIONS.items()
        for item in dataclasses.fields(kind)
    ]


def flat(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe by section.key."""
    return {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}


def select(recipe: Recipe, *identities: Identity) -> dict[str, Any]:
    """The values of a recipe whose keys have one of the given flags, by section.key; the rule in canonical spelling.

    Unknown keys, in a record of another version, count as task keys.
    """
    values, known = flat(recipe), dict(_flags())
    found = {key: value for key, value in values.items() if known.get(key, "task") in identities}
    if "model.feedback" in found:
        found["model.feedback"] = rule(values["model.cell"], found["model.feedback"])
    return found


def rule(cell: str, feedback: float | str) -> str:
    """The name of a feedback rule in tables: its canonical spelling, or the name of a cell that has no rule.

    Raises:
        ValueError: there is no such rule.

    >>> rule("gru", 0.0), rule("gru", "dsf@0.30/bptt"), rule("s4d", "bptt")
    ('ft-bptt', 'dsf@0.3/bptt', 's4d')
    """
    return str(sf.Schedule(feedback)) if cell in RECURRENT else cell


def check_rules(cell: str, feedback: float | str, forward: str = "sequential") -> None:
    """Check that a cell supports a rule, or every rule of a schedule, with a forward method.

    Raises:
        ValueError: there is no such rule or method, or the cell or the rule does not support it.
    """
    if cell in RECURRENT:
        for _, stage in sf.Schedule(feedback).stages:
            getattr(sf, cell.upper())(1, 1, feedback=stage).forward_method = forward


def difference(there: Recipe, here: Recipe, ignored: Collection[str] = ()) -> tuple[str, Any, Any] | None:
    """The first key in which the runs of two recipes differ, with both values; None if they are the same run.

    Args:
        there: the recipe in a run folder, in which paths are absolute.
        here: another recipe.
        ignored: keys that may differ.
    """
    first, second = flat(there), flat(here)
    for key in keys("task", "run"):
        if first[key] == second[key] or key in ignored:
            continue
        same = {"model.feedback": _same_rule, "data.path": _same_path}.get(key)
        if same is None or not same(first[key], second[key]):
            return key, first[key], second[key]
    return None


def _same_path(first: str | None, second: str | None) -> bool:
    return absolute(first) == absolute(second)


def _same_rule(first: float | str, second: float | str) -> bool:
    try:
        return str(sf.Schedule(first)) == str(sf.Schedule(second))
    except ValueError:
        return False
