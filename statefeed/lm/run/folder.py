"""The run folder: how it is made, what is checked before a run writes into it, and a trained run read back from it."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statefeed.lm import recipe
from statefeed.lm.config import Config, Data
from statefeed.lm.data import tokens
from statefeed.lm.data.corpora import Corpus
from statefeed.lm.data.tokens import Tokenizer
from statefeed.lm.errors import UsageError
from statefeed.lm.model import LanguageModel
from statefeed.lm.run import metadata
from statefeed.lm.run.best import load_weights
from statefeed.lm.run.distributed import Group
from statefeed.lm.run.files import BOARD, CHECKPOINTS, CONFIG, CURVES, METRICS, RECORD, TOKENIZER, WEIGHTS
from statefeed.lm.run.model_size import check_fits


@dataclass(frozen=True)
class Run:
    """A trained run, read back: its best weights in evaluation mode and what they were trained on."""

    config: Config
    metadata: dict[str, Any]
    tokenizer: Tokenizer
    model: LanguageModel


def check_unused(config: Config) -> None:
    """Check that the folder of a new run holds no run, so that none is ever overwritten.

    Raises:
        UsageError: when it does, or when the path is not a folder.
    """
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"run.dir: {folder} is a file, not a folder")
    metrics = folder / METRICS  # empty where a process ended before it had made the run
    if any((folder / name).exists() for name in (CONFIG, WEIGHTS)) or (metrics.exists() and metrics.stat().st_size):
        raise UsageError(
            f"{folder} already holds a run: resume it with --resume, choose another folder with --run.dir, or remove "
            "that one"
        )


def check_apart(data: Data, folder: Path, also: Sequence[str] = ()) -> None:
    """Check that a folder of results is not the text that is read, so that neither is taken for the other.

    A file of results may also be a link to a file of the text, which would be overwritten.

    Args:
        data: names the text.
        folder: of the run, or of a comparison.
        also: names of files that are written there, besides those of a run.

    Raises:
        UsageError: when they overlap.
    """
    if data.path is None or data.path.startswith("hub:"):
        return
    text, results = recipe.expand(data.path).resolve(), folder.resolve()
    written = [results / name for name in (CONFIG, RECORD, METRICS, WEIGHTS, TOKENIZER, CURVES, *also)]
    folders = {results / CHECKPOINTS, results / BOARD}
    linked = {_identity(path) for path in written if path.exists()}
    read = [text, *(text.iterdir() if linked and text.is_dir() else [])]
    if (
        text in (results, *written)
        or not folders.isdisjoint([text, *text.parents])
        or any(path.exists() and _identity(path) in linked for path in read)
    ):
        raise UsageError(f"run.dir must be another folder than the text of data.path, got {folder} and {data.path}")


def _identity(path: Path) -> tuple[int, int]:
    """The same for every link to one file."""
    found = path.stat()
    return found.st_dev, found.st_ino


def check_same_text(folder: Path, corpus: Corpus) -> None:
    """Check that the text of a run has not changed.

    Raises:
        UsageError: naming the split that differs.
    """
    recorded = metadata.read(folder)["splits"]
    for split, digest in corpus.digests.items():
        if recorded.get(split, {}).get("sha256") != digest:
            raise UsageError(f"{folder} cannot be resumed: the {split} split of {corpus.name} has changed")


def create(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, model: LanguageModel, steps_per_epoch: int, group: Group
) -> None:
    """Write everything that is known before the first step into the run folder, which is there and locked."""
    folder = Path(config.run.dir)
    splits = {split: {"sha256": corpus.digests[split], "bytes": corpus.sizes[split]} for split in corpus.splits}
    known = {
        "corpus": corpus.name,
        "splits": splits,
        "vocabulary": tokenizer.size,
        "steps_per_epoch": steps_per_epoch,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **metadata.environment(group),
    }
    metadata.write(folder, known)
    (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    unfinished = folder / CHECKPOINTS / CONFIG
    data = dataclasses.replace(config.data, path=recipe.absolute(config.data.path))
    unfinished.write_text(dataclasses.replace(config, data=data).to_yaml(), encoding="utf-8")
    os.replace(unfinished, folder / CONFIG)  # last: a folder that has it has everything


def load(folder: Path) -> Run:
    """Read a trained run.

    Raises:
        UsageError: when the folder is missing, or a file in it is missing or broken.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not a run folder: it holds no {CONFIG}")
    config = recipe.load(folder / CONFIG)
    found = metadata.read(folder)
    tokenizer = tokens.load(config.data, folder / TOKENIZER)
    check_fits(config.model, tokenizer.size, torch.device("cpu"))
    model = LanguageModel(config.model, tokenizer.size).eval()
    load_weights(model, folder)
    return Run(config, found, tokenizer, model)
