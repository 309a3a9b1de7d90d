"""Owns training: read, cut, step, score, keep the best weights."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from statefeed.lm import batches, cache, checkpoint, corpora
from statefeed.lm.agreement import agreement
from statefeed.lm.batches import Source
from statefeed.lm.config import Config, Train, UsageError
from statefeed.lm.corpora import Corpus
from statefeed.lm.evaluate import perplexity, score
from statefeed.lm.generate import generate
from statefeed.lm.log import Log
from statefeed.lm.model import LanguageModel, carried
from statefeed.lm.tokens import Tokenizer

SAMPLE_PROMPT, SAMPLE = 8, 150  # tokens


class Diverged(RuntimeError):
    """The loss is no longer a number that has a perplexity."""


@dataclass(frozen=True)
class Task:
    """Everything that a run needs, made without writing anything."""

    corpus: Corpus
    tokenizer: Tokenizer
    ids: dict[str, NDArray[np.int32]]
    source: Source
    valid: Source
    steps: int
    model: LanguageModel


def train(config: Config) -> None:
    """Train as a recipe says and leave a run folder with the weights that had the best validation perplexity.

    Raises:
        UsageError: before anything is written, when the recipe cannot be carried out.
        Diverged: when the loss becomes infinite or not a number.
        KeyboardInterrupt: when the user interrupts, saying what is kept.
    """
    folder = Path(config.run.dir)
    checkpoint.refuse_taken(folder)
    task = prepare(config)
    checkpoint.create(folder, config, task.corpus, task.tokenizer, task.model, len(task.source))
    best = checkpoint.Best(folder)
    with Log(folder / checkpoint.METRICS, task.steps) as log:
        log.say(_opening(task, config.train))
        try:
            optimise(task, config.train, log, best)
            report(task, config, log, best)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {folder} keeps {best}") from None
        except Diverged as error:
            raise Diverged(f"{error}; {folder} keeps {best}") from None
        finally:
            log.draw(folder / checkpoint.CURVES)


def prepare(config: Config) -> Task:
    """Read the corpus, fit the tokenizer, make the model.

    Raises:
        UsageError: when a split is shorter than one step, or one of the three refuses.
    """
    corpus = corpora.read(config.data)
    tokenizer = cache.tokenizer(config.data, corpus.splits)
    ids = {split: cache.encode(tokenizer, text) for split, text in corpus.splits.items()}
    columns, context = config.train.batch, config.train.context
    for split, found in ids.items():
        needed = 1 + context * (columns if split == "train" else 1) if config.data.batches == "stream" else 2
        if len(found) < needed:
            raise UsageError(
                f"the {split} split of {corpus.name} has {len(found):,} {config.data.tokens} tokens, fewer than the "
                f"{needed:,} of one step (train.batch {columns}, train.context {context})"
            )
    source = batches.training(ids["train"], config.data, config.train)
    valid = batches.scoring(ids["valid"], config.data, config.train)
    steps = config.train.steps or config.train.epochs * len(source)
    torch.manual_seed(config.train.seed)
    return Task(corpus, tokenizer, ids, source, valid, steps, LanguageModel(config.model, tokenizer.size))


def optimise(task: Task, recipe: Train, log: Log, best: checkpoint.Best) -> None:
    """Take all the steps: this is the training loop."""
    model, source, steps = task.model, task.source, task.steps
    scored = {max(1, steps * (i + 1) // recipe.evaluations) for i in range(recipe.evaluations)}
    fixed = next(source.epoch(0))
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[recipe.optimizer]
    optimizer = kind(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    for step in range(1, steps + 1):
        epoch, place = divmod(step - 1, len(source))
        if place == 0:
            epoch_batches, states = source.epoch(epoch), None
        batch = next(epoch_batches)
        cost = model.loss(batch, states)
        columns = batch.inputs.shape[1]
        loss = cost.mean if recipe.loss == "mean" else cost.nats / columns
        states = carried(cost.states, torch.rand(columns, 1) >= recipe.restart)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, steps, epoch)
        optimizer.step()
        log.step(step, epoch + 1, _checked(cost.mean.item(), step), cost.tokens)
        if step in scored:
            valid = score(model, task.valid, task.corpus.sizes["valid"])
            _checked(valid.loss, step)
            log.score(step, epoch + 1, "valid", valid)
            best.offer(model, step, epoch + 1, valid)
            if recipe.alignment:
                found = agreement(model, lambda model, batch: model.loss(batch).mean, fixed)
                if found is not None:
                    log.align(step, epoch + 1, found, cost.tokens)


def report(task: Task, config: Config, log: Log, best: checkpoint.Best) -> None:
    """Score the best weights on the test split, where there is one, and show a sample of theirs."""
    model = task.model.eval()
    checkpoint.load_weights(model, best.folder)
    if "test" in task.ids:
        source = batches.scoring(task.ids["test"], config.data, config.train)
        test = score(model, source, task.corpus.sizes["test"])
        log.score(best.step, best.epoch, "test", test)
        log.say(f"test: {test}")
    else:
        log.say(f"valid: {best.score} ({task.corpus.name} has no test split)")
    sample = [int(i) for i in task.ids["valid"][:SAMPLE_PROMPT]]
    following = generate(
        model, sample, temperature=0.8, top_p=0.95, seed=config.train.seed, sentence=task.tokenizer.sentence
    )
    sample += [next(following) for _ in range(SAMPLE)]
    log.say(f"a sample, its first {SAMPLE_PROMPT} tokens given:\n\n{task.tokenizer.decode(sample)}\n")
    log.say(f"{best.folder} keeps {best}, its configuration, tokenizer, metrics and curves")


def learning_rate(recipe: Train, step: int, steps: int, epoch: int) -> float:
    """The learning rate of one step.

    Args:
        recipe: peak, warmup and schedule.
        step: counted from 1.
        steps: of the whole run.
        epoch: that the step belongs to, counted from 0.

    >>> [round(learning_rate(Train(lr=1.0, warmup=2, schedule="linear"), step, 6, 0), 2) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    >>> halved = Train(lr=1.0, warmup=0, schedule="steps", decay=0.5, decay_after=2, decay_every=1)
    >>> [learning_rate(halved, 1, 9, epoch) for epoch in range(5)]
    [1.0, 1.0, 0.5, 0.25, 0.125]
    """
    warmup = round(recipe.warmup * steps) if recipe.warmup < 1 else int(recipe.warmup)
    if step <= warmup:
        return recipe.lr * step / warmup
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "steps":
        return float(recipe.lr * recipe.decay ** max(0, (epoch - recipe.decay_after) // recipe.decay_every + 1))
    left = 1 - (step - 1 - warmup) / (steps - warmup)
    if recipe.schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return recipe.lr * (recipe.floor + (1 - recipe.floor) * left)


def _checked(loss: float, step: int) -> float:
    """The loss, where it has a perplexity."""
    if not math.isfinite(perplexity(loss)):
        raise Diverged(f"training diverged (loss {loss} at step {step:,}): lower train.lr or change model.feedback")
    return loss


def _opening(task: Task, recipe: Train) -> str:
    """What is trained on what, in one line."""
    amounts = ", ".join(f"{len(found):,} {split}" for split, found in task.ids.items())
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    return (
        f"{task.corpus.name}: {amounts} tokens of {task.tokenizer.size:,} types; {parameters:,} parameters; "
        f"{task.steps:,} steps of {recipe.batch} x {recipe.context} tokens"
    )
