"""Language-model training loop."""

import dataclasses
import shlex
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

import numpy as np
import torch
from torch import Tensor

import statefeed as sf
from statefeed import native as kernels
from statefeed.lm import recipe as recipes
from statefeed.lm.config import RECURRENT, Config, Train
from statefeed.lm.data import batches
from statefeed.lm.data.batches import IGNORED, Batch, Source, to_device
from statefeed.lm.errors import CorruptFile, Diverged, Interrupted
from statefeed.lm.model import LanguageModel, State, detach_states
from statefeed.lm.run import folder as run_folder
from statefeed.lm.run import metadata
from statefeed.lm.run import resume as resuming
from statefeed.lm.run.agreement import agreement
from statefeed.lm.run.best import BestWeights, load_weights
from statefeed.lm.run.checkpoint import Checkpoints
from statefeed.lm.run.device import autocast_context
from statefeed.lm.run.distributed import Group, finite, shard_batch
from statefeed.lm.run.evaluate import is_scored, newton_iterations, score
from statefeed.lm.run.failures import describe_failure
from statefeed.lm.run.files import BOARD, CHECKPOINTS, CONFIG, CURVES, METRICS
from statefeed.lm.run.generate import generate
from statefeed.lm.run.kernel_paths import kernel_paths
from statefeed.lm.run.learning_rate import learning_rate
from statefeed.lm.run.lock import lock
from statefeed.lm.run.log import Log
from statefeed.lm.run.next_steps import next_steps, program
from statefeed.lm.run.setup import Setup, check_recipe, prepare
from statefeed.lm.run.signals import SignalHandler

SAMPLE_PROMPT, SAMPLE = 8, 150  # tokens


def train(config: Config, resume: bool = False, brief: bool = False) -> None:
    """Train a model and write a run folder with the weights of the best validation perplexity.

    Args:
        config: the recipe.
        resume: resume the run in the folder, if there is one, bit for bit.
        brief: end without a sample and the next commands, also after an interruption.

    Raises:
        UsageError: the recipe cannot be run (before anything is written), or disk or memory are full (later).
        Diverged: the loss became infinite or NaN.
        PeerLost: another process of the job has ended.
        KeyboardInterrupt: a signal ended the training.
    """
    folder = recipes.expand(config.run.dir)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
    with SignalHandler() as signals, Group.join(config.train) as group, ExitStack() as stack:
        with describe_failure(lambda: "training had not begun"):
            check_recipe(config, group)
            resume = resume and (folder / CONFIG).exists()
            writes = group.rank == 0
            changes = None
            if resume:
                if writes:
                    stack.enter_context(lock(folder))
                changes = resuming.check(config)
            else:
                run_folder.check_apart(config.data, folder)
                run_folder.check_unused(config)
            setup = prepare(config, resume, group)
            group.barrier()  # all processes must have checked the folder before one writes into it
            if not resume and writes:
                (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(folder))
                run_folder.check_unused(config)  # another process may have created a run meanwhile
                run_folder.create(config, setup.corpus, setup.tokenizer, setup.model, len(setup.source), group)
            best, checkpoints = BestWeights(folder, writes), Checkpoints(folder, config.run, writes)
            states, log_state, corrupt = None, None, list[CorruptFile]()
            if changes is not None:
                states, log_state, corrupt = checkpoints.load(setup.model, setup.optimizer, setup.scaler)
                if changes.extended is not None:
                    resuming.check_weights(folder, best.step, checkpoints.step)
                if writes:
                    metadata.resume(folder, checkpoints.step, group)
                    changes.write(folder, checkpoints.step)
            if group.device.type == "cpu":  # those of a GPU are compiled one by one when they are launched
                kernels.available()  # compiled before the log starts, whose seconds are those of the run
        path, board = folder / METRICS, folder / BOARD if config.run.tensorboard else None
        place = metadata.where(metadata.read(folder)) if writes else ""
        remedy = "" if brief else f"; resume with `{program()} train --resume {shlex.quote(str(folder))}`"

        def saved() -> str:
            return f"{folder} keeps {checkpoints} and {best}" if exists() else f"{folder} was removed"

        def exists() -> bool:
            return (folder / CONFIG).exists()

        with (
            describe_failure(saved, lambda: remedy if exists() else ""),
            Log(path if writes else None, setup.steps, log_state, board, group.device, place) as log,
        ):
            for sentence in corrupt:
                log.print(f"{sentence}; resuming from {checkpoints}")
            log.print(setup.describe(config, group))
            if changes is not None:
                log.print(f"resuming after step {checkpoints.step:,}")
                if changes.extended is not None:
                    log.print(_describe_extension(config, changes.extended, checkpoints.step, len(setup.source)))
            if writes:
                paths = kernel_paths(setup.model, config, next(setup.source.epoch(0)), group)
                metadata.record_paths(folder, checkpoints.step, paths)
            try:
                optimize(setup, config, log, best, checkpoints, group, states, signals)
                if writes:
                    report(setup, config, log, best, group.device, brief)
            except BaseException as error:
                if writes:
                    with suppress(Exception):  # an error of plotting must not hide the first error
                        log.draw(folder / CURVES)
                    if isinstance(error, Diverged):
                        with suppress(OSError):
                            metadata.update(folder, diverged=str(error))
                raise


def optimize(
    setup: Setup,
    config: Config,
    log: Log,
    best: BestWeights,
    checkpoints: Checkpoints,
    group: Group,
    states: list[State] | None,
    signals: SignalHandler,
) -> None:
    """The training loop: run all steps after the last checkpoint.

    Args:
        setup: the corpus, the model and the optimizer.
        config: the recipe.
        log: receives every step and score.
        best: saves the best weights.
        checkpoints: the checkpoints of the run; the last one has been loaded.
        group: the processes of the job.
        states: the states in the last checkpoint.
        signals: a caught signal ends the loop after a step is finished and saved.

    Raises:
        Interrupted: a signal ended the loop.
        Diverged: the loss or the weights are no longer finite.
    """
    recipe, source, steps = config.train, setup.source, setup.steps
    model, optimizer, scaler = setup.model, setup.optimizer, setup.scaler
    rules = sf.Schedule(config.model.feedback) if config.model.cell in RECURRENT else None
    keeps_states = config.data.batches == "stream"
    autocast = autocast_context(recipe.precision, group.device)
    first, marked = checkpoints.step + 1, False
    parts = group.columns(recipe.batch, recipe.accumulate)
    before = [None if states is None else group.shard(states, part) for part in parts]
    with signals.deferred():
        log.time_phase(None)
        for step, batch in zip(range(first, steps + 1), _batches(source, first), strict=False):
            epoch, columns = (step - 1) // len(source), batch.inputs.shape[1]
            keep_mask = to_device(seed_step(recipe, step, columns, group.rank), group.device)
            counted = int((batch.targets != IGNORED).sum())
            divisor = counted if recipe.loss == "mean" else columns
            if rules is not None:
                rules.apply(model, (step - 1) / steps)
            optimizer.zero_grad()
            nats = torch.zeros((), device=group.device)
            log.time_phase("data")
            local_parts = group.columns(columns, recipe.accumulate)
            for i, part in enumerate(local_parts):
                if group.has_shard(part):
                    if recipe.compile is not None:
                        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                    with group.guard_collectives():
                        with autocast:
                            loss = model.loss(shard_batch(batch, part), before[i])
                        log.time_phase("forward")
                        scaler.scale(loss.sum / divisor).backward()  # type: ignore[no-untyped-call]
                    nats += loss.sum.detach()
                    before[i] = detach_states(loss.states, keep_mask[part]) if keeps_states else None
                    log.time_phase("backward")
            nats = group.reduce_gradients(model, nats, (local_parts[-1].stop - local_parts[0].start) / columns)
            stop, save = (bool(n) for n in group.all_reduce_sum(signals.caught is not None, checkpoints.due))
            scaler.unscale_(optimizer)
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, steps, epoch)
            scaler.step(optimizer)
            scaler.update()
            log.time_phase("optimizer")
            log.step(step, epoch + 1, nats / counted, counted)
            if is_scored(step, steps, recipe.evaluations):
                with _uncompiled(recipe):
                    _score(setup, recipe, log, best, group, step, epoch + 1)
            if stop or save or step == steps:
                _save(setup, log, checkpoints, group, step, before)
                if group.rank == 0 and not marked:
                    marked = metadata.mark_checkpointed(best.folder)
            if stop and step < steps:
                raise Interrupted(f"interrupted after step {step:,} of {steps:,}", signals.caught or signal.SIGTERM)
            log.time_phase(None)


def report(setup: Setup, config: Config, log: Log, best: BestWeights, device: torch.device, brief: bool) -> None:
    """Score the best weights on the test split, if the corpus has one, and print a sample unless brief."""
    model = LanguageModel(config.model, setup.tokenizer.size).eval()  # the model in training may be sharded
    load_weights(model, best.folder)
    model.to(device)
    if "test" in setup.ids:
        source = batches.scoring(setup.ids["test"], config.data, config.train)
        test = score(model, source, setup.corpus.sizes["test"])
        log.score(best.step, best.epoch, "test", test)
        log.print(f"test: {test}")
    else:
        log.print(f"valid: {best.score} ({setup.corpus.name} has no test split)")
    if not brief:
        sample = [int(i) for i in setup.ids["valid"][:SAMPLE_PROMPT]]
        following = generate(
            model, sample, temperature=0.8, top_p=0.95, seed=config.train.seed, sentence=setup.tokenizer.sentence
        )
        sample += [next(following) for _ in range(SAMPLE)]
        log.print(f"a sample, with a prompt of {SAMPLE_PROMPT} tokens:\n\n{setup.tokenizer.decode(sample)}\n")
    log.print(f"{best.folder} keeps {best}, its configuration, tokenizer, metrics and curves")
    log.draw(best.folder / CURVES)
    if not brief:
        log.print(next_steps(config, best.folder, list(setup.ids)))


def _describe_extension(config: Config, extended: tuple[int, int], step: int, steps_per_epoch: int) -> str:
    """One line about the schedule of an extended run."""
    before, now = extended
    rate = learning_rate(config.train, step + 1, now, step // steps_per_epoch)
    return (
        f"extended from {before:,} to {now:,} steps: learning rate and feedback rule follow train.schedule="
        f"{config.train.schedule} and model.feedback={config.model.feedback} over {now:,} steps, so that step "
        f"{step + 1:,} has learning rate {rate:.3g}"
    )


def _batches(source: Source, step: int) -> Iterator[Batch]:
    """Yield the batches of consecutive epochs, starting with that of a step; steps are counted from 1."""
    epoch, start = divmod(step - 1, len(source))
    while True:
        yield from source.epoch(epoch, start)
        epoch, start = epoch + 1, 0


def seed_step(recipe: Train, step: int, columns: int, rank: int) -> Tensor:
    """Seed torch's generator for a step, and draw which states to reset.

    All random numbers of a step are functions of the seed and the step, so that a checkpoint does not store generators.

    Returns:
        bool (columns, 1), false for sequences whose state is reset after the step; equal in all processes. Dropout,
        drawn by torch's generator, differs between processes.
    """
    generator = np.random.default_rng((recipe.seed, step, 1))
    torch.manual_seed(int(generator.integers(2**62)) + rank)
    return torch.from_numpy(generator.random((columns, 1)) >= recipe.state_reset_prob)


def _score(setup: Setup, recipe: Train, log: Log, best: BestWeights, group: Group, step: int, epoch: int) -> None:
    """Score the validation split, save the weights if they are the best, and log the alignment of the gradient."""
    valid = score(setup.model, setup.valid, setup.corpus.sizes["valid"], group)
    log.score(step, epoch, "valid", valid, **newton_iterations(setup.model))
    best.offer(setup.model, step, epoch, valid)
    if group.rank == 0:
        with suppress(OSError):  # the picture of the whole run is drawn at its end, and raises there
            log.draw(best.folder / CURVES)
    if recipe.alignment:
        first = next(setup.source.epoch(0))
        fixed = shard_batch(first, Group().columns(first.inputs.shape[1], recipe.accumulate)[0])
        found = agreement(setup.model, lambda model, batch: model.loss(batch).mean, fixed)
        if found is not None:
            log.log_alignment(step, epoch, found, int((fixed.targets != IGNORED).sum()))


def _uncompiled(recipe: Train) -> AbstractContextManager[object]:
    """Context in which compiled blocks run eagerly: evaluation has other shapes and rules than training."""
    return nullcontext() if recipe.compile is None else torch.compiler.set_stance("force_eager")


def _save(
    setup: Setup, log: Log, checkpoints: Checkpoints, group: Group, step: int, states: list[list[State] | None]
) -> None:
    """Save a checkpoint if the weights are finite.

    Raises:
        Diverged: the weights are not finite; the previous checkpoint stays the last one.
    """
    log_state = log.state_dict(step)
    if not finite(setup.model, group):
        raise Diverged(f"training diverged (weights after step {step:,}): lower train.lr or change model.feedback")
    local_states = [state for state in states if state is not None]
    with group.guard_collectives():
        gathered = group.gather(local_states) if local_states else None
        checkpoints.save(step, setup.model, setup.optimizer, setup.scaler, gathered, log_state)
