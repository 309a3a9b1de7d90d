"""Checkpoints of a run: everything that the next step depends on."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statefeed.lm import config, migration
from statefeed.lm.errors import CorruptFile
from statefeed.lm.model import LanguageModel, State
from statefeed.lm.model.learned import learned_state
from statefeed.lm.run import tensor_file
from statefeed.lm.run.distributed import distribute_like, gather_tensors
from statefeed.lm.run.files import CHECKPOINTS


class Checkpoints:
    """The latest checkpoints of a run, one file each.

    States of random generators and the order of the text are not saved, since they are functions of the seed and the
    step. Sharded tensors are gathered: a file does not depend on the number of processes, and can be loaded by any
    number.

    Args:
        folder: the run folder.
        recipe: minutes between checkpoints, and how many to keep.
        writes: whether this process writes files.
    """

    def __init__(self, folder: Path, recipe: config.Run, writes: bool = True) -> None:
        self.step = 0  # of the last valid checkpoint
        self._folder, self._keep, self._writes = folder / CHECKPOINTS, recipe.checkpoints, writes
        self._seconds, self._last = 60 * recipe.checkpoint_minutes, time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the time for another checkpoint has come."""
        return time.monotonic() - self._last >= self._seconds

    def save(
        self,
        step: int,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        states: list[State] | None,
        log: dict[str, Any],
    ) -> None:
        """Save a checkpoint and remove the oldest ones; all processes must call this.

        Args:
            step: number of completed steps.
            model: the model, whose learned rules are saved too.
            optimizer: the optimizer of its parameters.
            scaler: the scaler of the loss.
            states: initial states of the next step, one per block.
            log: the state of the log.
        """
        named = {**_model_state(model), **_optimizer_state(model, optimizer), **_name_states(states or [])}
        tensors = gather_tensors(named, self._writes)
        if self._writes:
            metadata = {"step": step, "log": log, "scaler": scaler.state_dict()}
            tensor_file.write(self._path(step), self._folder, tensors, metadata)
            newest = [path for path in self._paths() if path.name <= self._path(step).name][: self._keep]
            # Keep other files of the user; remove unfinished files of a killed process. Those of safetensors have
            # the name .tmp and six characters.
            unfinished = [*self._folder.glob("*.unfinished"), *self._folder.glob(".tmp??????")]
            for path in [*self._paths(), *unfinished]:
                if path not in newest:
                    path.unlink()
        self.step, self._last = step, time.monotonic()

    def load(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> tuple[list[State] | None, dict[str, Any], list[CorruptFile]]:
        """Restore all three from the last valid checkpoint; leave them unchanged if the run has no checkpoint.

        Returns:
            The initial states of the next step, the state of the log, and the errors of later, corrupt checkpoints.

        Raises:
            CorruptFile: all checkpoints are corrupt, or the last valid one does not match the recipe.
        """
        corrupt: list[CorruptFile] = []
        for path in self._paths():
            try:
                tensors, metadata = tensor_file.read(path)
            except CorruptFile as error:
                corrupt.append(error)
                continue
            try:
                restore(model, optimizer, tensors)
                if scaler.is_enabled():
                    scaler.load_state_dict(metadata["scaler"])
                self.step = metadata["step"]
                return _read_states(tensors), migration.log_state(metadata["log"]), corrupt
            except (KeyError, RuntimeError) as error:
                raise CorruptFile(
                    f"{path} does not match the recipe of the run: {' '.join(str(error).split())}"
                ) from error
        if corrupt:
            raise CorruptFile("; ".join(map(str, corrupt)) + f"; no checkpoint in {self._folder} can be resumed")
        return None, {}, corrupt

    def __str__(self) -> str:
        return f"the checkpoint of step {self.step:,}" if self.step else "no checkpoint"

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09}.safetensors"

    def _paths(self) -> list[Path]:
        """Paths of the checkpoints, newest first."""
        return sorted(self._folder.glob(f"step-{'[0-9]' * 9}.safetensors"), reverse=True)


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in (*model.named_parameters(), *learned_state(model).items())}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a checkpoint into the model and the optimizer.

    Tensors are copied into memory that torch has allocated, since results may depend on the alignment of a tensor. For
    this reason `torch.distributed.checkpoint.state_dict.set_optimizer_state_dict` is not used: it keeps a tensor with
    the right device and dtype without a copy. It also takes an optimizer step first, to create the state.
    """
    for name, value in _model_state(model).items():
        value.copy_(distribute_like(tensors[name], value))
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}/"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): distribute_like(value, parameter)
            if value.dim()
            else value.to(parameter.device, copy=True)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }


def _name_states(states: list[State]) -> dict[str, Tensor]:
    """States by name: `state.BLOCK` for a block with one tensor, else `state.BLOCK.PART`; BLOCK has three digits."""
    names: dict[str, Tensor] = {}
    for block, state in enumerate(states):
        if isinstance(state, Tensor):
            names[f"state.{block:03}"] = state
        else:
            names |= {f"state.{block:03}.{part}": value for part, value in enumerate(state)}
    return names


def _read_states(tensors: Mapping[str, Tensor]) -> list[State] | None:
    """The inverse of `_name_states`; None if the checkpoint has no states."""
    states: dict[str, State] = {}
    for name, value in sorted(tensors.items()):
        if name.startswith("state."):
            _, block, *part = name.split(".")
            states[block] = (*states.get(block, ()), value.clone()) if part else value.clone()
    return list(states.values()) or None
