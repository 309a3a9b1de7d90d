"""Checks of a resumed run: it may change its length, the path of its text, and the place where it runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from statefeed.lm import identity, recipe
from statefeed.lm.config import Config
from statefeed.lm.errors import UsageError
from statefeed.lm.run import metadata
from statefeed.lm.run.files import CHECKPOINTS, CONFIG, METRICS

_LENGTH = ("train.steps", "train.epochs")
_PATH = "data.path"  # the text itself is compared by its digests


@dataclasses.dataclass(frozen=True)
class Changes:
    """Differences from the recipe in the run folder.

    Args:
        values: new values by section.key, to be written into that recipe.
        extended: number of steps of the whole run before and now; None if unchanged.
    """

    values: dict[str, Any]
    extended: tuple[int, int] | None

    def write(self, folder: Path, step: int) -> None:
        """Write the changes into the recipe and the record of the run.

        Args:
            folder: the run folder.
            step: step of the checkpoint that the run is resumed from.
        """
        if self.extended is not None:
            before, now = self.extended
            entry = {"step": step, "from": before, "to": now}
            metadata.update(folder, extended=[*metadata.read(folder).get("extended", []), entry])
        if self.values:
            recipe.change(folder / CONFIG, self.values, folder / CHECKPOINTS)


def check(config: Config) -> Changes:
    """Check that the run in the recipe's folder can be resumed with this recipe.

    Returns:
        The changes to the recipe of the run.

    Raises:
        UsageError: a key differs that must not, or the checkpoints are missing.
    """
    folder = Path(config.run.dir)
    there, here = dataclasses.asdict(recipe.load(folder / CONFIG)), dataclasses.asdict(config)
    if found := identity.difference(there, here, ignored=(*_LENGTH, _PATH)):
        _raise_difference(folder, *found)
    record = metadata.read(folder)
    _check_checkpoints(folder, record)
    before, now = (
        values["train"]["steps"] or values["train"]["epochs"] * record["steps_per_epoch"] for values in (there, here)
    )
    old, new = identity.flat(there), identity.flat(here)
    changed = [key for key in _LENGTH if old[key] != new[key]]
    if changed and now <= before:
        if now == before and old["train.steps"] == new["train.steps"] is not None:
            raise UsageError(
                f"train.epochs has no effect while train.steps is {now}: extend the run with --train.steps, or add "
                "--train.steps=null"
            )
        if now < before:
            _raise_difference(
                folder,
                changed[0],
                old[changed[0]],
                new[changed[0]],
                f": it can be extended beyond its {before:,} steps only",
            )
    values = {key: new[key] for key in changed}
    if recipe.absolute(old[_PATH]) != recipe.absolute(new[_PATH]):
        values[_PATH] = recipe.absolute(new[_PATH])
    return Changes(values, (before, now) if now > before else None)


def check_weights(folder: Path, best: int, step: int) -> None:
    """Check that the best weights of a run to extend are not later than its checkpoint, as after a kill.

    A resumed run makes these weights again. An extended one has other learning rates, and would keep weights that are
    not its own.

    Args:
        folder: the run folder.
        best: step of the best weights.
        step: step of the checkpoint.

    Raises:
        UsageError: the weights are later.
    """
    if best > step:
        raise UsageError(
            f"{folder} cannot be extended yet: its weights are of step {best:,}, after its checkpoint of step "
            f"{step:,}; resume it without a change of its length until step {best:,} first"
        )


def _raise_difference(folder: Path, key: str, old: object, new: object, more: str = "") -> None:
    raise UsageError(f"{folder} cannot be resumed with another recipe: {key} is {old} there, got {new}{more}")


def _check_checkpoints(folder: Path, record: dict[str, Any]) -> None:
    """Check that a run that had checkpoints still has one; otherwise it would start from step 0 again."""
    if any((folder / CHECKPOINTS).glob("step-*.safetensors")):
        return
    step = _last_step(folder / METRICS)
    if step and (record.get("checkpointed") or not (folder / CHECKPOINTS).is_dir()):
        raise UsageError(
            f"{folder} holds metrics of step {step:,} but no checkpoint, from which alone it can be resumed: copy "
            f"{CHECKPOINTS}/ from where the run was trained, or train again in another folder"
        )


def _last_step(path: Path) -> int:
    """The last step in the metrics of a run, 0 if there are no metrics."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (KeyError, TypeError, ValueError):  # the last row of a killed run may have no end
            continue
    return 0
