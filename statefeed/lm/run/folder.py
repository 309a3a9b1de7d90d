"""The run folder: its creation, the checks before a run writes into it, and loading a trained run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statefeed.lm import recipe
from statefeed.lm.atomic_file import write_text
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
    """A trained run: its configuration, metadata, tokenizer, and model with the best weights in evaluation mode."""

    config: Config
    metadata: dict[str, Any]
    tokenizer: Tokenizer
    model: LanguageModel


def check_unused(config: Config) -> None:
    """Check that the folder of a new run holds no run, so that no run is overwritten.

    Raises:
        UsageError: the folder holds a run, or is a file.
    """
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"run.dir: {folder} is a file, not a folder")
    metrics = folder / METRICS  # empty if a process ended before it had created the run
    if any((folder / name).exists() for name in (CONFIG, WEIGHTS)) or (metrics.exists() and metrics.stat().st_size):
        raise UsageError(
            f"{folder} already holds a run: resume it with --resume, choose another folder with --run.dir, or remove "
            "the folder"
        )


def check_apart(data: Data, folder: Path, also: Sequence[str] = ()) -> None:
    """Check that the folder of results does not contain the text.

    A file of results may also be a link to a file of the text, which would be overwritten.

    Args:
        data: its path is the text.
        folder: folder of the run, or of a comparison.
        also: names of further files that are written into the folder.

    Raises:
        UsageError: the two overlap.
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
    """Device and inode of a file, which are equal for all links to it."""
    found = path.stat()
    return found.st_dev, found.st_ino


def check_same_text(folder: Path, corpus: Corpus) -> None:
    """Check that the text of a run has not changed.

    Raises:
        UsageError: a split has changed.
    """
    recorded = metadata.read(folder)["splits"]
    for split, digest in corpus.digests.items():
        if recorded.get(split, {}).get("sha256") != digest:
            raise UsageError(f"{folder} cannot be resumed: the {split} split of {corpus.name} has changed")


def create(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, model: LanguageModel, steps_per_epoch: int, group: Group
) -> None:
    """Write configuration, metadata and tokenizer of a new run into its folder, which exists and is locked."""
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
    write_text(folder / TOKENIZER, tokenizer.to_json(), folder / CHECKPOINTS)
    data = dataclasses.replace(config.data, path=recipe.absolute(config.data.path))
    # Written last: a folder with this file is complete.
    write_text(folder / CONFIG, dataclasses.replace(config, data=data).to_yaml(), folder / CHECKPOINTS)


def load(folder: Path) -> Run:
    """Load a trained run.

    Raises:
        UsageError: the folder is missing, or a file in it is missing or corrupt.
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
