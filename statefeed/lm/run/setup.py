"""Setup of a run: corpus, tokenizer, batches, model and optimizer, without writing files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import statefeed as sf
from statefeed.lm import identity
from statefeed.lm.config import RECURRENT, Config, Train
from statefeed.lm.data import batches, cache, corpora, tokens
from statefeed.lm.data.batches import Source
from statefeed.lm.data.corpora import Corpus
from statefeed.lm.data.tokens import Tokenizer
from statefeed.lm.errors import UsageError, notify, require
from statefeed.lm.model import LanguageModel
from statefeed.lm.run import folder as run_folder
from statefeed.lm.run import tensorboard
from statefeed.lm.run.device import autocast_context, device_metadata
from statefeed.lm.run.distributed import Group
from statefeed.lm.run.files import TOKENIZER
from statefeed.lm.run.model_size import check_fits


@dataclass(frozen=True)
class Setup:
    """The text, the model and the optimizer of a run.

    Args:
        corpus: the text.
        tokenizer: its tokenizer.
        ids: token ids by split, int32 (N,).
        source: batches of the training split.
        valid: batches of the validation split.
        steps: number of steps of the whole run.
        model: the model on its device, sharded under FSDP.
        optimizer: the optimizer of its parameters.
        scaler: the loss scaler, enabled for float16.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    ids: dict[str, NDArray[np.int32]]
    source: Source
    valid: Source
    steps: int
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def describe(self, recipe: Train, group: Group) -> str:
        """One line about the corpus, the model, the number of steps and the device."""
        processes = f", {group.size} processes ({recipe.parallel})" if group.size > 1 else ""
        amounts = ", ".join(f"{len(found):,} {split}" for split, found in self.ids.items())
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{self.corpus.name}: {amounts} tokens of {self.tokenizer.size:,} types; {parameters:,} parameters; "
            f"{self.steps:,} steps of {recipe.batch} x {recipe.context} tokens on "
            f"{device_metadata(group.device)['device']}{processes}"
        )


def check_recipe(config: Config, group: Group) -> None:
    """Check a recipe without reading the text or the run folder.

    Raises:
        UsageError: a feedback rule or precision is not supported, a dependency is not installed, or there is no text.
    """
    recipe = config.train
    parts = recipe.accumulate * group.size
    require(
        recipe.batch % parts == 0,
        f"train.batch must be a multiple of train.accumulate times the processes of the job, {parts}",
        recipe.batch,
    )
    require(
        config.data.batches != "sentences" or config.model.cell not in RECURRENT or recipe.compile is None,
        f"train.compile must be null for data.batches=sentences with model.cell={config.model.cell}: torch.compile "
        "cannot trace its packed rows",
        recipe.compile,
    )
    try:
        identity.check_rules(config.model.cell, config.model.feedback, config.model.forward)
    except ValueError as error:
        raise UsageError(f"{config.model.rule_keys}: {error}") from error
    if config.run.tensorboard:
        tensorboard.writer_class()
    autocast_context(recipe.precision, group.device)
    corpora.check_path(config.data)


def prepare(config: Config, resume: bool, group: Group) -> Setup:
    """Read the corpus, fit the tokenizer, create the model and the optimizer.

    Args:
        config: the recipe.
        resume: load the tokenizer from the run folder, and check that the text has not changed.
        group: the processes of the job.

    Raises:
        UsageError: a split is shorter than one step, or the corpus, the tokenizer or the model cannot be created.
    """
    folder, recipe = Path(config.run.dir), config.train
    corpus = corpora.read(config.data)
    if resume:
        run_folder.check_same_text(folder, corpus)
        tokenizer = tokens.load(config.data, folder / TOKENIZER)
    else:
        tokenizer = cache.tokenizer(config.data, corpus.splits)
    ids = {split: cache.encode(tokenizer, text) for split, text in corpus.splits.items()}
    columns, context = recipe.batch, recipe.context
    for split, found in ids.items():
        needed = 1 + context * (columns if split == "train" else 1) if config.data.batches == "stream" else 2
        if len(found) < needed:
            raise UsageError(
                f"the {split} split of {corpus.name} has {len(found):,} {config.data.tokens} tokens, fewer than the "
                f"{needed:,} of one step (train.batch {columns}, train.context {context})"
            )
    source = batches.training(ids["train"], config.data, recipe)
    if isinstance(source, batches.Sentences) and source.trained < source.tokens / 2:
        notify(
            f"data.batches=sentences trains on {source.trained:,} of {source.tokens:,} tokens: lines are truncated to "
            f"{context} tokens; raise train.context, or use data.batches=stream"
        )
    valid = batches.scoring(ids["valid"], config.data, recipe)
    steps = recipe.steps or recipe.epochs * len(source)
    check_fits(config.model, tokenizer.size, group.device, group.size if group.sharded else 1)
    torch.manual_seed(recipe.seed)
    model = LanguageModel(config.model, tokenizer.size)
    _apply_rules(model, config)
    group.distribute(model)
    if recipe.compile is not None:
        torch._dynamo.config.allow_rnn = True
        for block in model.blocks:
            block.compile(mode=recipe.compile)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[recipe.optimizer]
    fused = recipe.optimizer == "adam" or not group.sharded  # torch's fused SGD does not support sharded weights
    optimizer = kind(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    scaler = torch.amp.GradScaler(group.device.type, enabled=recipe.precision == "float16")
    return Setup(corpus, tokenizer, ids, source, valid, steps, model, optimizer, scaler)


def _apply_rules(model: LanguageModel, config: Config) -> None:
    """Apply every rule of a schedule once, ending with the first, so that the tensors of learned rules exist."""
    rules = sf.Schedule(config.model.feedback)
    for fraction in (*(until for until, _ in rules.stages), 0.0):
        rules.apply(model, fraction)
