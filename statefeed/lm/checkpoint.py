"""Owns the run folder: what a run leaves behind, written so that no file is ever half there, and read back."""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import statefeed as sf
from statefeed.lm import config, tokens
from statefeed.lm.config import Config, UsageError
from statefeed.lm.corpora import Corpus
from statefeed.lm.evaluate import Score
from statefeed.lm.model import LanguageModel
from statefeed.lm.tokens import Tokenizer

CONFIG, RECORD, TOKENIZER, WEIGHTS = "config.yaml", "record.json", "tokenizer.json", "weights.safetensors"
METRICS, CURVES = "metrics.jsonl", "curves.png"


@dataclass(frozen=True)
class Run:
    """A trained run, read back: its best weights in evaluation mode and what they were trained on."""

    config: Config
    record: dict[str, Any]
    tokenizer: Tokenizer
    model: LanguageModel


def refuse_taken(folder: Path) -> None:
    """Refuse a folder that holds a run already, so that none is ever overwritten.

    Raises:
        UsageError: when it does, or when the path is not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"run.dir: {folder} is a file, not a folder")
    if any((folder / name).exists() for name in (CONFIG, METRICS, WEIGHTS)):
        raise UsageError(f"{folder} already holds a run: choose another folder with --run.dir, or remove that one")


def create(
    folder: Path, config: Config, corpus: Corpus, tokenizer: Tokenizer, model: LanguageModel, steps_per_epoch: int
) -> None:
    """Make the run folder with everything that is known before the first step."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "corpus": corpus.name,
        "splits": {split: {"sha256": corpus.digests[split], "bytes": corpus.sizes[split]} for split in corpus.splits},
        "vocabulary": tokenizer.size,
        "steps_per_epoch": steps_per_epoch,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "statefeed": sf.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")


def save_weights(model: LanguageModel, folder: Path) -> None:
    """Replace the weights of the run; whenever this is interrupted, the old or the new ones are there, whole."""
    unfinished = folder / f"{WEIGHTS}.unfinished"
    try:
        save_file(model.state_dict(), unfinished)
        os.replace(unfinished, folder / WEIGHTS)
    finally:
        unfinished.unlink(missing_ok=True)


class Best:
    """The weights with the best validation score so far; they are the ones that a run keeps.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step, self.epoch = 0, 0
        self.score: Score | None = None

    def offer(self, model: LanguageModel, step: int, epoch: int, score: Score) -> None:
        """Save the weights if they are better than those kept."""
        if self.score is None or score.loss < self.score.loss:
            save_weights(model, self.folder)
            self.step, self.epoch, self.score = step, epoch, score

    def __str__(self) -> str:
        if self.score is None:
            return "no weights, since it ended before the first validation"
        return f"the weights of step {self.step:,}, the best so far (valid perplexity {self.score.perplexity:.2f})"


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Give the model the weights of the run.

    Raises:
        UsageError: when the run has none, or they do not fit.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UsageError(f"{folder} holds no weights yet: its training did not come to a first validation")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UsageError(f"{path} does not fit the recipe beside it: {' '.join(str(error).split())}") from error


def load(folder: Path) -> Run:
    """Read a run back.

    Raises:
        UsageError: when the folder is missing, or a file in it is missing or broken.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not a run folder: it holds no {CONFIG}")
    recipe = config.load(folder / CONFIG)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / RECORD} cannot be read: {error}") from error
    tokenizer = tokens.load(recipe.data, folder / TOKENIZER)
    model = LanguageModel(recipe.model, tokenizer.size).eval()
    load_weights(model, folder)
    return Run(recipe, record, tokenizer, model)
