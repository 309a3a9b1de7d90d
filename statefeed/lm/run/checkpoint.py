"""Owns the run folder: what a run leaves behind, written so that no file is ever half there, and read back."""

import dataclasses
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import statefeed as sf
from statefeed.lm import config
from statefeed.lm.config import Config, UsageError
from statefeed.lm.data import tokens
from statefeed.lm.data.corpora import Corpus
from statefeed.lm.data.tokens import Tokenizer
from statefeed.lm.model.language_model import LanguageModel, State
from statefeed.lm.run import provenance
from statefeed.lm.run.device import described
from statefeed.lm.run.distributed import Group, full, like
from statefeed.lm.run.evaluate import Score
from statefeed.lm.run.schema import checked

CONFIG, RECORD, TOKENIZER, WEIGHTS = "config.yaml", "record.json", "tokenizer.json", "weights.safetensors"
METRICS, CURVES, CHECKPOINTS, BOARD = "metrics.jsonl", "curves.png", "checkpoints", "tensorboard"

# What every record holds, besides other facts.
_FACTS = {"splits": {...: {"sha256": str}}, "steps_per_epoch": int, "parameters": int, "continued": ([{}], None)}

# Keys of the recipe that say how a run is computed, not what: it may go on elsewhere.
ELSEWHERE = {"device", "parallel", "compile"}


class Broken(UsageError):
    """A file of tensors that is not what was written."""


@dataclass(frozen=True)
class Run:
    """A trained run, read back: its best weights in evaluation mode and what they were trained on."""

    config: Config
    record: dict[str, Any]
    tokenizer: Tokenizer
    model: LanguageModel


def refuse_taken(recipe: Config) -> None:
    """Refuse a folder that holds a run already, so that none is ever overwritten.

    Raises:
        UsageError: when it does, or when the path is not a folder.
    """
    folder = Path(recipe.run.dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"run.dir: {folder} is a file, not a folder")
    if any((folder / name).exists() for name in (CONFIG, METRICS, WEIGHTS)):
        raise UsageError(
            f"{folder} already holds a run: go on with it by --resume, choose another folder with --run.dir, or remove "
            "that one"
        )


def refuse_other(recipe: Config) -> None:
    """Refuse to go on with the run of another recipe in the recipe's folder.

    Where and how a run is kept may change, and where and by how many processes it is computed.

    Raises:
        UsageError: naming the first key that differs.
    """
    folder = Path(recipe.run.dir)
    there, here = dataclasses.asdict(config.load(folder / CONFIG)), dataclasses.asdict(recipe)
    for section in ("data", "model", "train"):
        for key, value in there[section].items():
            if here[section][key] != value and key not in ELSEWHERE:
                raise UsageError(
                    f"{folder} cannot go on with another recipe: {section}.{key} is {value} there, got "
                    f"{here[section][key]}"
                )


def refuse_other_text(folder: Path, corpus: Corpus) -> None:
    """Refuse to go on with a run on a text that has changed.

    Raises:
        UsageError: naming the split that differs.
    """
    recorded = record(folder)["splits"]
    for split, digest in corpus.digests.items():
        if recorded.get(split, {}).get("sha256") != digest:
            raise UsageError(f"{folder} cannot go on: the {split} split of {corpus.name} is not the text that it had")


def create(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, model: LanguageModel, steps_per_epoch: int, group: Group
) -> None:
    """Make the run folder with everything that is known before the first step."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "corpus": corpus.name,
        "splits": {split: {"sha256": corpus.digests[split], "bytes": corpus.sizes[split]} for split in corpus.splits},
        "vocabulary": tokenizer.size,
        "steps_per_epoch": steps_per_epoch,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_circumstances(group),
    }
    (folder / RECORD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    unfinished = folder / CHECKPOINTS / CONFIG
    unfinished.write_text(config.to_yaml(), encoding="utf-8")
    os.replace(unfinished, folder / CONFIG)  # last: a folder that has it has everything


def _circumstances(group: Group) -> dict[str, Any]:
    """By what a run is computed, and where."""
    return {
        "statefeed": sf.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **provenance.commit(),
        "machine": f"{provenance.processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "processes": group.size,
        **described(group.device),
    }


def go_on(folder: Path, step: int, group: Group) -> None:
    """Add to the run's record, under "continued", what is not as it was when the run began or last went on.

    Args:
        folder: the run folder.
        step: after which it goes on.
        group: the processes of the job.
    """
    facts = record(folder)
    continued = facts.get("continued") or []
    before = {**facts, **{key: value for part in continued for key, value in part.items()}}
    if changed := {key: value for key, value in _circumstances(group).items() if before.get(key) != value}:
        amend(folder, continued=[*continued, {"step": step, **changed}])


def amend(folder: Path, **facts: Any) -> None:
    """Put facts into the record of a run; the old or the new record is there, whole."""
    unfinished = folder / CHECKPOINTS / f"{RECORD}.unfinished"
    unfinished.write_text(json.dumps({**record(folder), **facts}, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / RECORD)


def write(path: Path, folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace a safetensors file; whenever this is interrupted, the old or the new one is there, whole.

    Args:
        path: of the file.
        folder: of the same file system, for what is unfinished.
        tensors: by name.
        facts: what JSON can hold, kept with a checksum of everything in the file's metadata.
    """
    text = json.dumps(facts)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    unfinished = folder / f"{path.name}.unfinished"
    try:
        save_file(contiguous, unfinished, {"facts": text, "sha256": _digest(contiguous, text)})
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except SafetensorError as error:  # which tells errors of the system in words
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else 0, os.strerror(int(code[1])) if code else str(error), path) from error
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file that `write` left.

    Raises:
        Broken: when it is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Broken(f"{path} is broken, perhaps by a full disk: {' '.join(str(error).split())}") from error
    if metadata.get("sha256") != _digest(tensors, metadata.get("facts", "")):
        raise Broken(f"{path} is broken: its content has changed since it was written")
    return tensors, json.loads(metadata["facts"])


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    """The sha256 of everything: facts, names, types, shapes and values."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Best:
    """The weights with the best validation score so far; they are the ones that a run keeps.

    Args:
        folder: the run folder; where it holds weights already, those are the best so far.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self._writes = folder, writes
        self.step, self.epoch = 0, 0
        self.score: Score | None = None
        if (folder / WEIGHTS).exists():
            try:
                _, facts = read(folder / WEIGHTS)
            except Broken as error:
                raise Broken(f"{error}; remove it to go on without the best weights so far") from error
            self.step, self.epoch, self.score = facts["step"], facts["epoch"], Score(**facts["score"])

    def offer(self, model: LanguageModel, step: int, epoch: int, score: Score) -> None:
        """Save the weights if they are better than those kept; called by all processes."""
        if self.score is None or score.loss < self.score.loss:
            weights = _gathered(model.state_dict(), self._writes)
            if self._writes:
                facts = {"step": step, "epoch": epoch, "score": dataclasses.asdict(score)}
                write(self.folder / WEIGHTS, self.folder / CHECKPOINTS, weights, facts)
            self.step, self.epoch, self.score = step, epoch, score

    def __str__(self) -> str:
        if self.score is None:
            return "no weights, since it ended before the first validation"
        return f"the weights of step {self.step:,}, the best so far (valid perplexity {self.score.perplexity:.2f})"


class Checkpoints:
    """The last checkpoints of a run: each one file of all that the next step depends on.

    Randomness and the order of the text are not in it, since they are functions of the seed and the step. Sharded
    tensors are put together: the file is the same whatever the number of processes, and fits any other.

    Args:
        folder: the run folder.
        recipe: how often, and how many are kept.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, recipe: config.Run, writes: bool = True) -> None:
        self.step = 0  # of the last good one
        self._folder, self._keep, self._writes = folder / CHECKPOINTS, recipe.checkpoints, writes
        self._seconds, self._last = 60 * recipe.checkpoint_minutes, time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last one is old enough for another."""
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
        """Add the checkpoint of a step and remove those that are too many; called by all processes.

        Args:
            step: that is done.
            model: with the buffers of calibrated rules.
            optimizer: of its parameters.
            scaler: of the loss.
            states: carried to the next step, one per block.
            log: what the log has to remember.
        """
        tensors = _gathered({**_variables(model), **_moments(model, optimizer), **_named(states or [])}, self._writes)
        if self._writes:
            facts = {"step": step, "log": log, "scaler": scaler.state_dict()}
            write(self._path(step), self._folder, tensors, facts)
            kept = [path for path in self._paths() if path.name <= self._path(step).name][: self._keep]
            # What a user has put beside them stays; what was unfinished when a process was killed goes.
            for path in [*self._paths(), *self._folder.glob("*.unfinished")]:
                if path not in kept:
                    path.unlink()
        self.step, self._last = step, time.monotonic()

    def load(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> tuple[list[State] | None, dict[str, Any], list[Broken]]:
        """Put all three back to the last good checkpoint; to the beginning of the run where there is none.

        Returns:
            The carried states, what the log has to remember, and what is wrong with later checkpoints.

        Raises:
            Broken: when there are checkpoints and all are broken.
        """
        broken: list[Broken] = []
        for path in self._paths():
            try:
                tensors, facts = read(path)
            except Broken as error:
                broken.append(error)
                continue
            try:
                _put_back(model, optimizer, tensors)
                if scaler.is_enabled():
                    scaler.load_state_dict(facts["scaler"])
                self.step = facts["step"]
                return _states(tensors), facts["log"], broken
            except (KeyError, RuntimeError) as error:
                raise Broken(f"{path} does not fit the recipe beside it: {' '.join(str(error).split())}") from error
        if broken:
            raise Broken("; ".join(map(str, broken)) + f"; no checkpoint in {self._folder} can be resumed")
        return None, {}, broken

    def __str__(self) -> str:
        return f"the checkpoint of step {self.step:,}" if self.step else "no checkpoint"

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09}.safetensors"

    def _paths(self) -> list[Path]:
        """The newest first."""
        return sorted(self._folder.glob(f"step-{'[0-9]' * 9}.safetensors"), reverse=True)


@torch.no_grad()
def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors on the CPU, sharded ones put together, one after the other; nothing for who does not keep them."""
    whole = ((name, full(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in whole if keep}


def _variables(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in (*model.named_parameters(), *model.named_buffers())}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _named(states: list[State]) -> dict[str, Tensor]:
    """Of a block with one state `state.BLOCK`, of one with several `state.BLOCK.PART`; blocks have three digits."""
    names: dict[str, Tensor] = {}
    for block, state in enumerate(states):
        if isinstance(state, Tensor):
            names[f"state.{block:03}"] = state
        else:
            names |= {f"state.{block:03}.{part}": value for part, value in enumerate(state)}
    return names


def _states(tensors: Mapping[str, Tensor]) -> list[State] | None:
    """The states that `_named` named."""
    states: dict[str, State] = {}
    for name, value in sorted(tensors.items()):
        if name.startswith("state."):
            _, block, *part = name.split(".")
            states[block] = (*states.get(block, ()), value.clone()) if part else value.clone()
    return list(states.values()) or None


@torch.no_grad()
def _put_back(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy into memory of torch's own, since results may depend on where a tensor begins."""
    for name, value in _variables(model).items():
        value.copy_(like(tensors[name], value))
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}/"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): like(value, parameter) if value.dim() else value.to(parameter.device, copy=True)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Give the model the weights of the run.

    Raises:
        UsageError: when the run has none, or they are broken or do not fit.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UsageError(f"{folder} holds no weights yet: its training did not come to a first validation")
    tensors, _ = read(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit the recipe beside it: {' '.join(str(error).split())}") from error


def load(folder: Path) -> Run:
    """Read a run back.

    Raises:
        UsageError: when the folder is missing, or a file in it is missing or broken.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not a run folder: it holds no {CONFIG}")
    recipe = config.load(folder / CONFIG)
    facts = record(folder)
    tokenizer = tokens.load(recipe.data, folder / TOKENIZER)
    model = LanguageModel(recipe.model, tokenizer.size).eval()
    load_weights(model, folder)
    return Run(recipe, facts, tokenizer, model)


def record(folder: Path) -> dict[str, Any]:
    """The facts of a run that were known before its first step, with what was added since.

    Raises:
        UsageError: when they cannot be read.
    """
    try:
        facts: dict[str, Any] = checked(json.loads((folder / RECORD).read_text(encoding="utf-8")), _FACTS)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / RECORD} cannot be read: {error}") from error
    return facts
