"""Where `statefeed train --again` trains: the run that was interrupted, or a numbered one beside finished ones."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

from statefeed.lm import identity, recipe
from statefeed.lm.config import Config
from statefeed.lm.run.files import CONFIG


def again(config: Config, unfinished: Callable[[Path], bool]) -> tuple[Config, bool, str | None]:
    """The recipe with the folder to train in.

    The folders are run.dir, run.dir-2, run.dir-3 and so on. The first that is free, or that holds an unfinished run of
    this recipe, is taken.

    Args:
        config: the recipe.
        unfinished: whether the run in a folder has not ended.

    Returns:
        The recipe, whether its run is to be resumed, and why it is not a new run in run.dir, if so.
    """
    first = recipe.expand(config.run.dir)
    for number in itertools.count(1):
        folder = first if number == 1 else recipe.beside(config.run.dir, f"-{number}")
        here = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
        if not (folder / CONFIG).is_file():
            why = None if number == 1 else f"{first} holds a run that has ended or is of another recipe"
            return here, False, why and f"{why}: this one is in {folder}"
        there = dataclasses.asdict(recipe.load(folder / CONFIG))
        if unfinished(folder) and not identity.difference(there, dataclasses.asdict(config)):
            return here, True, f"resuming the unfinished run in {folder}"
    raise AssertionError("there is always a next number")
