"""Models of about as many parameters, trained alike: each at its own best learning rate against one of them."""

import json
from collections.abc import Sequence

from statefeed.lm import identity
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.tasks import differing_keys, setting, size, split
from statefeed.lm.compare.verdicts import Terms, Verdicts, compare_groups
from statefeed.lm.config import RECURRENT

TOLERANCE = 0.05  # of the number of parameters of the first model


def compare_models(results: Sequence[Result], terms: Terms) -> dict[str, Verdicts]:
    """Compare the models of every text and training procedure that have about as many parameters.

    The baseline is the first model of the results that has runs of the baseline's rule; models whose number of
    parameters differs by more than 5% from its are left out. Two models have other initial weights: a pair of one seed
    has the same order of the text alone.

    Args:
        results: of any tasks.
        terms: what is asked.

    Returns:
        By title, the models, every rule of a model apart; nothing for a text and training that one model had.
    """
    groups = split(results, _training)
    trainings = {key: json.loads(key) for key in groups}
    found = {}
    for key, group in groups.items():
        sized = [result for result in group if result.metadata.get("parameters")]
        first = next((result for result in sized if result.rule == terms.baseline), None)
        if first is None:
            continue
        parameters = first.metadata["parameters"]
        equal = [r for r in sized if is_of_equal_size(r.metadata["parameters"], parameters)]
        if len(split(equal, _model)) > 1:
            same_title = [trainings[k] for k, other in groups.items() if _title(other[0]) == _title(first)]
            more = "".join(f", {name}={trainings[key].get(name)}" for name in differing_keys(same_title))
            title = f"{_title(first)}{more}, models of {parameters:,} parameters, within {TOLERANCE:.0%}"
            models = _by_name(equal)
            name = next(name for name, runs in models.items() if any(run is first for run in runs))
            found[title] = compare_groups(models, Terms(name, terms.within), results, "model, rule")
    return found


def is_of_equal_size(parameters: int, others: int) -> bool:
    """Whether two numbers of parameters differ by at most 5%.

    >>> is_of_equal_size(104, 100), is_of_equal_size(100, 104), is_of_equal_size(106, 100)
    (True, True, False)
    """
    return max(parameters, others) <= (1 + TOLERANCE) * min(parameters, others)


def _training(result: Result) -> str:
    """The text and the training procedure: the setting without the model."""
    values = setting(result)
    return json.dumps({key: value for key, value in values.items() if not key.startswith("model.")}, sort_keys=True)


def _model(result: Result) -> str:
    """The model without its rule."""
    values = identity.select(result.config, "task")
    return json.dumps({key: value for key, value in values.items() if key.startswith("model.")}, sort_keys=True)


def _by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of every model and rule; names have the keys in which models of the same cell, size and block differ."""
    found: dict[str, list[Result]] = {}
    for name, same in split(results, lambda result: f"{size(result)} {result.get('model.block')}").items():
        models = {key: json.loads(key) for key in split(same, _model)}
        differing = differing_keys(list(models.values()))
        for result in same:
            more = "".join(f", {key}={models[_model(result)].get(key)}" for key in differing)
            rule = f" under {result.rule}" if result.get("model.cell") in RECURRENT else ""
            found.setdefault(f"{name}{more}{rule}", []).append(result)
    return found


def _title(result: Result) -> str:
    steps = result.get("train.steps")
    return f"{result.metadata.get('corpus')}, " + (
        f"{steps} steps" if steps else f"{result.get('train.epochs')} epochs"
    )
