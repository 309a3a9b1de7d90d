"""Models of about as many parameters, trained alike: each at its own best learning rate against one of them."""

import json
import math
from collections.abc import Sequence

from statefeed.lm import identity
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.tasks import setting, size, split
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
    found = {}
    for group in split(results, _training).values():
        sized = [result for result in group if result.metadata.get("parameters")]
        first = next((result for result in sized if result.rule == terms.baseline), None)
        if first is None:
            continue
        parameters = first.metadata["parameters"]
        equal = [r for r in sized if abs(math.log(r.metadata["parameters"] / parameters)) <= math.log1p(TOLERANCE)]
        if len(split(equal, _model)) > 1:
            title = f"{_title(first)}, models of {parameters:,} parameters, within {TOLERANCE:.0%}"
            models = split(equal, _name)
            found[title] = compare_groups(models, Terms(_name(first), terms.within), results, "model, rule")
    return found


def _training(result: Result) -> str:
    """The text and the training procedure: the setting without the model."""
    values = setting(result)
    return json.dumps({key: value for key, value in values.items() if not key.startswith("model.")}, sort_keys=True)


def _model(result: Result) -> str:
    """The model without its rule."""
    values = identity.select(result.config, "task")
    return json.dumps({key: value for key, value in values.items() if key.startswith("model.")}, sort_keys=True)


def _name(result: Result) -> str:
    rule = f" under {result.rule}" if result.get("model.cell") in RECURRENT else ""
    return f"{size(result)} {result.get('model.block')}{rule}"


def _title(result: Result) -> str:
    steps = result.get("train.steps")
    return f"{result.metadata.get('corpus')}, " + (
        f"{steps} steps" if steps else f"{result.get('train.epochs')} epochs"
    )
