"""Owns training: read, cut, step, score, keep the best weights and the last checkpoints."""

import math
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import statefeed as sf
from statefeed import native as kernels
from statefeed.lm.config import Config, Train, UsageError, require
from statefeed.lm.data import batches, cache, corpora, tokens
from statefeed.lm.data.batches import IGNORED, Batch, Source, to_device
from statefeed.lm.data.corpora import Corpus
from statefeed.lm.data.tokens import Tokenizer
from statefeed.lm.model.language_model import LanguageModel, State, carried
from statefeed.lm.run import checkpoint
from statefeed.lm.run.agreement import agreement
from statefeed.lm.run.checkpoint import Best, Checkpoints
from statefeed.lm.run.device import described, narrowed
from statefeed.lm.run.distributed import Group, finite, part_of
from statefeed.lm.run.endings import Diverged, Interrupted, Signals, told
from statefeed.lm.run.evaluate import score
from statefeed.lm.run.generate import generate
from statefeed.lm.run.log import Log, board_writer

SAMPLE_PROMPT, SAMPLE = 8, 150  # tokens
PATIENCE = 3.0  # seconds, in which kernels are loaded but not compiled


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
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def train(config: Config, resume: bool = False) -> None:
    """Train as a recipe says and leave a run folder with the weights that had the best validation perplexity.

    Args:
        config: the recipe.
        resume: go on with the run in the folder, where there is one, as if it had never stopped.

    Raises:
        UsageError: before anything is written, when the recipe cannot be carried out; later, when disk or memory are
            full.
        Diverged: when the loss becomes infinite or not a number.
        Lost: when another process of the job is gone.
        KeyboardInterrupt: when a signal ends it.
    """
    folder = Path(config.run.dir)
    with Signals() as signals, Group.join(config.train) as group:
        with told(lambda: "training had not begun"):
            resume = resume and (folder / checkpoint.CONFIG).exists()
            (checkpoint.refuse_other if resume else checkpoint.refuse_taken)(config)
            task = prepare(config, resume, group)
            group.wait()  # until all have seen what the folder holds
            if not resume and group.rank == 0:
                checkpoint.create(config, task.corpus, task.tokenizer, task.model, len(task.source), group)
            writes = group.rank == 0
            best, checkpoints = Best(folder, writes), Checkpoints(folder, config.run, writes)
            states, memory, broken = None, None, list[checkpoint.Broken]()
            if resume:
                states, memory, broken = checkpoints.load(task.model, task.optimizer, task.scaler)
                if writes:
                    checkpoint.go_on(folder, checkpoints.step, group)
        path, board = folder / checkpoint.METRICS, folder / checkpoint.BOARD if config.run.tensorboard else None
        again = f"; go on with `statefeed train --resume --run.dir={shlex.quote(str(folder))}`"
        with (
            told(lambda: f"{folder} keeps {checkpoints} and {best}", again),
            Log(path if writes else None, task.steps, memory, board, group.device) as log,
        ):
            for sentence in broken:
                log.say(f"{sentence}; going on from {checkpoints}")
            log.say(_opening(task, config.train, group))
            if resume:
                log.say(f"going on after step {checkpoints.step:,}")
            _load_kernels(group.device, log)
            try:
                optimise(task, config, log, best, checkpoints, group, states, signals)
                if writes:
                    report(task, config, log, best, group.device)
            except BaseException as error:
                if writes:
                    with suppress(OSError):  # what ended the run is told, not that a full disk takes no picture of it
                        log.draw(folder / checkpoint.CURVES)
                        if isinstance(error, Diverged):
                            checkpoint.amend(folder, diverged=str(error))
                raise
            if writes:
                log.draw(folder / checkpoint.CURVES)


def prepare(config: Config, resume: bool, group: Group) -> Task:
    """Read the corpus, fit the tokenizer, make the model.

    Args:
        config: the recipe.
        resume: take the tokenizer from the run folder, and refuse another text than the run's.
        group: the processes of the job.

    Raises:
        UsageError: when a split is shorter than one step, or one of the three refuses.
    """
    folder, recipe = Path(config.run.dir), config.train
    parts = recipe.accumulate * group.size
    require(
        recipe.batch % parts == 0,
        f"train.batch must be a multiple of train.accumulate times the processes of the job, {parts}",
        recipe.batch,
    )
    if config.run.tensorboard:
        board_writer()
    narrowed(recipe.precision, group.device)
    corpus = corpora.read(config.data)
    if resume:
        checkpoint.refuse_other_text(folder, corpus)
        tokenizer = tokens.load(config.data, folder / checkpoint.TOKENIZER)
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
    valid = batches.scoring(ids["valid"], config.data, recipe)
    steps = recipe.steps or recipe.epochs * len(source)
    torch.manual_seed(recipe.seed)
    model = LanguageModel(config.model, tokenizer.size)
    _refuse_rules(model, config)
    group.place(model)
    if recipe.compile is not None:
        torch._dynamo.config.allow_rnn = True
        for block in model.blocks:
            block.compile(mode=recipe.compile)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[recipe.optimizer]
    fused = recipe.optimizer == "adam" or not group.sharded  # torch's fused SGD takes no sharded weights
    optimizer = kind(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    scaler = torch.amp.GradScaler(group.device.type, enabled=recipe.precision == "float16")
    return Task(corpus, tokenizer, ids, source, valid, steps, model, optimizer, scaler)


def optimise(
    task: Task,
    config: Config,
    log: Log,
    best: Best,
    checkpoints: Checkpoints,
    group: Group,
    states: list[State] | None,
    signals: Signals,
) -> None:
    """Take all the steps after the last checkpoint: this is the training loop.

    Args:
        task: what is trained on what.
        config: the recipe.
        log: takes note of every step and score.
        best: keeps the best weights.
        checkpoints: of the run; the last one has been loaded.
        group: the processes of the job.
        states: carried from the last checkpoint.
        signals: which end this when a step is finished and saved.
    """
    recipe, source, steps = config.train, task.source, task.steps
    model, optimizer, scaler = task.model, task.optimizer, task.scaler
    rules, carries = sf.Schedule(config.model.feedback), config.data.batches == "stream"
    narrow = narrowed(recipe.precision, group.device)
    scored = {max(1, steps * (i + 1) // recipe.evaluations) for i in range(recipe.evaluations)}
    first = checkpoints.step + 1
    parts = group.columns(recipe.batch, recipe.accumulate)
    before = [None if states is None else group.part(states, part) for part in parts]
    with signals.held():
        log.lap(None)
        for step, batch in zip(range(first, steps + 1), _batches(source, first), strict=False):
            epoch, columns = (step - 1) // len(source), batch.inputs.shape[1]
            kept = to_device(_draw(recipe, step, columns, group.rank), group.device)
            counted = int((batch.targets != IGNORED).sum())
            share = counted if recipe.loss == "mean" else columns
            rules.apply(model, (step - 1) / steps)
            optimizer.zero_grad()
            nats = torch.zeros((), device=group.device)
            log.lap("data")
            own = group.columns(columns, recipe.accumulate)
            for i, part in enumerate(own):
                if group.takes(part):
                    if recipe.compile is not None:
                        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                    with group.peers():
                        with narrow:
                            cost = model.loss(part_of(batch, part), before[i])
                        log.lap("forward")
                        scaler.scale(cost.nats / share).backward()  # type: ignore[no-untyped-call]
                    nats += cost.nats.detach()
                    before[i] = carried(cost.states, kept[part]) if carries else None
                    log.lap("backward")
            nats = group.sum(model, nats, (own[-1].stop - own[0].start) / columns)
            stop, save = (bool(of) for of in group.total(signals.caught is not None, checkpoints.due))
            scaler.unscale_(optimizer)
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, steps, epoch)
            scaler.step(optimizer)
            scaler.update()
            log.lap("optimiser")
            log.step(step, epoch + 1, nats / counted, counted)
            if step in scored:
                with _uncompiled(recipe):
                    _score(task, recipe, log, best, group, step, epoch + 1)
            if stop or save or step == steps:
                _save(task, log, checkpoints, group, step, before)
            if stop and step < steps:
                raise Interrupted(f"interrupted after step {step:,} of {steps:,}", signals.caught or signal.SIGTERM)
            log.lap(None)


def report(task: Task, config: Config, log: Log, best: checkpoint.Best, device: torch.device) -> None:
    """Score the best weights on the test split, where there is one, and show a sample of theirs."""
    model = LanguageModel(config.model, task.tokenizer.size).eval()  # whole, where the one in training is sharded
    checkpoint.load_weights(model, best.folder)
    model.to(device)
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


def _batches(source: Source, step: int) -> Iterator[Batch]:
    """The batches of one epoch after the other, from that of a step on, counted from 1."""
    epoch, start = divmod(step - 1, len(source))
    while True:
        yield from source.epoch(epoch, start)
        epoch, start = epoch + 1, 0


def _draw(recipe: Train, step: int, columns: int, rank: int) -> Tensor:
    """Everything random in a step is a function of the seed and the step, so that no checkpoint has to remember it.

    Returns:
        Which sequences keep their past at the end of the step, (columns, 1), the same in every process; dropout, which
        torch's generator draws, differs from process to process.
    """
    generator = np.random.default_rng((recipe.seed, step, 1))
    torch.manual_seed(int(generator.integers(2**62)) + rank)
    return torch.from_numpy(generator.random((columns, 1)) >= recipe.restart)


def _score(task: Task, recipe: Train, log: Log, best: Best, group: Group, step: int, epoch: int) -> None:
    """Score the validation split, keep the weights if they are the best, compare their gradient with the exact one."""
    valid = score(task.model, task.valid, task.corpus.sizes["valid"], group)
    log.score(step, epoch, "valid", valid)
    best.offer(task.model, step, epoch, valid)
    if recipe.alignment:
        first = next(task.source.epoch(0))
        fixed = part_of(first, Group().columns(first.inputs.shape[1], recipe.accumulate)[0])
        found = agreement(task.model, lambda model, batch: model.loss(batch).mean, fixed)
        if found is not None:
            log.align(step, epoch, found, int((fixed.targets != IGNORED).sum()))


def _load_kernels(device: torch.device, log: Log) -> None:
    """Load the CPU's kernels, which its first run has to compile, so that no step is charged with it; say if it takes.

    Those of a GPU are compiled one by one when they are launched.
    """
    if device.type != "cpu":
        return
    waiting = threading.Timer(PATIENCE, log.say, ["compiling the kernels for this machine, which is done once"])
    waiting.daemon = True
    waiting.start()
    try:
        kernels.available()
    finally:
        waiting.cancel()


def _uncompiled(recipe: Train) -> AbstractContextManager[object]:
    """Blocks as they are: scores and exact gradients come with other shapes and rules than training."""
    return nullcontext() if recipe.compile is None else torch.compiler.set_stance("force_eager")


def _save(
    task: Task, log: Log, checkpoints: Checkpoints, group: Group, step: int, states: list[list[State] | None]
) -> None:
    """Make a checkpoint, unless the last step has ruined the weights: the one before is the last good one then.

    Raises:
        Diverged: when it has.
    """
    memory = log.memory(step)
    if not finite(task.model, group):
        raise Diverged(f"training diverged (weights after step {step:,}): lower train.lr or change model.feedback")
    held = [state for state in states if state is not None]
    with group.peers():
        whole = group.whole(held) if held else None
        checkpoints.save(step, task.model, task.optimizer, task.scaler, whole, memory)


def _refuse_rules(model: LanguageModel, config: Config) -> None:
    """Put every rule of a schedule to the layers once, the first one last.

    Raises:
        UsageError: when one does not fit.
    """
    rules = sf.Schedule(config.model.feedback)
    try:
        for begin in (*(until for until, _ in rules.stages), 0.0):
            rules.apply(model, begin)
    except ValueError as error:
        raise UsageError(f"model.feedback={config.model.feedback}: {error}") from error


def _opening(task: Task, recipe: Train, group: Group) -> str:
    """What is trained on what and where, in one line."""
    processes = f", {group.size} processes ({recipe.parallel})" if group.size > 1 else ""
    amounts = ", ".join(f"{len(found):,} {split}" for split, found in task.ids.items())
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    return (
        f"{task.corpus.name}: {amounts} tokens of {task.tokenizer.size:,} types; {parameters:,} parameters; "
        f"{task.steps:,} steps of {recipe.batch} x {recipe.context} tokens on {described(group.device)['device']}"
        f"{processes}"
    )
