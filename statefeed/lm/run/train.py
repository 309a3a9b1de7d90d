"""Language-model training loop."""

import dataclasses
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

import numpy as np
import torch
from torch import Tensor

import statefeed as sf
from statefeed import native as kernels
from statefeed.lm import recipe as recipes
from statefeed.lm.config import Config, Train
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
from statefeed.lm.run.evaluate import score
from statefeed.lm.run.failures import describe_failure
from statefeed.lm.run.files import BOARD, CHECKPOINTS, CONFIG, CURVES, METRICS
from statefeed.lm.run.generate import generate
from statefeed.lm.run.learning_rate import learning_rate
from statefeed.lm.run.lock import lock
from statefeed.lm.run.log import Log
from statefeed.lm.run.next_steps import next_steps, program
from statefeed.lm.run.setup import Setup, prepare
from statefeed.lm.run.signals import SignalHandler

SAMPLE_PROMPT, SAMPLE = 8, 150  # tokens
PATIENCE = 3.0  # seconds, in which kernels are loaded but not compiled


def train(config: Config, resume: bool = False) -> None:
    """Train as a recipe says and leave a run folder with the weights that had the best validation perplexity.

    Args:
        config: the recipe.
        resume: resume the run in the folder, where there is one, bit for bit.

    Raises:
        UsageError: before anything is written, when the recipe cannot be carried out; later, when disk or memory are
            full.
        Diverged: when the loss becomes infinite or not a number.
        PeerLost: when another process of the job has ended.
        KeyboardInterrupt: when a signal ends it.
    """
    folder = recipes.expand(config.run.dir)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
    with SignalHandler() as signals, Group.join(config.train) as group, ExitStack() as held:
        with describe_failure(lambda: "training had not begun"):
            resume = resume and (folder / CONFIG).exists()
            writes = group.rank == 0
            changes = None
            if resume:
                if writes:
                    held.enter_context(lock(folder))
                changes = resuming.check(config)
            else:
                run_folder.check_apart(config.data, folder)
                run_folder.check_unused(config)
            setup = prepare(config, resume, group)
            group.barrier()  # until all have seen what the folder holds
            if not resume and writes:
                (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
                held.enter_context(lock(folder))
                run_folder.check_unused(config)  # another process may have made a run since
                run_folder.create(config, setup.corpus, setup.tokenizer, setup.model, len(setup.source), group)
            best, checkpoints = BestWeights(folder, writes), Checkpoints(folder, config.run, writes)
            states, log_state, corrupt = None, None, list[CorruptFile]()
            if changes is not None:
                states, log_state, corrupt = checkpoints.load(setup.model, setup.optimizer, setup.scaler)
                if writes:
                    metadata.resume(folder, checkpoints.step, group)
                    changes.write(folder, checkpoints.step)
        path, board = folder / METRICS, folder / BOARD if config.run.tensorboard else None
        remedy = f"; resume with `{program()} train --resume --run.dir={shlex.quote(str(folder))}`"

        def saved() -> str:
            return f"{folder} keeps {checkpoints} and {best}" if there() else f"{folder} was removed, and keeps nothing"

        def there() -> bool:
            return (folder / CONFIG).exists()

        with (
            describe_failure(saved, lambda: remedy if there() else ""),
            Log(path if writes else None, setup.steps, log_state, board, group.device) as log,
        ):
            for sentence in corrupt:
                log.print(f"{sentence}; resuming from {checkpoints}")
            log.print(setup.describe(config.train, group))
            if changes is not None:
                log.print(f"resuming after step {checkpoints.step:,}")
                if changes.extended is not None:
                    log.print(_describe_extension(config, changes.extended, checkpoints.step, len(setup.source)))
            _load_kernels(group.device, log)
            try:
                optimize(setup, config, log, best, checkpoints, group, states, signals)
                if writes:
                    report(setup, config, log, best, group.device)
            except BaseException as error:
                if writes:
                    with suppress(Exception):  # a picture that cannot be drawn must not hide what ended the run
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
    """Take all the steps after the last checkpoint: this is the training loop.

    Args:
        setup: what is trained on what.
        config: the recipe.
        log: gets every step and score.
        best: keeps the best weights.
        checkpoints: of the run; the last one has been loaded.
        group: the processes of the job.
        states: of the last checkpoint.
        signals: which end this when a step is finished and saved.
    """
    recipe, source, steps = config.train, setup.source, setup.steps
    model, optimizer, scaler = setup.model, setup.optimizer, setup.scaler
    rules, keeps_states = sf.Schedule(config.model.feedback), config.data.batches == "stream"
    autocast = autocast_context(recipe.precision, group.device)
    scored = {max(1, steps * (i + 1) // recipe.evaluations) for i in range(recipe.evaluations)}
    first, marked = checkpoints.step + 1, False
    parts = group.columns(recipe.batch, recipe.accumulate)
    before = [None if states is None else group.shard(states, part) for part in parts]
    with signals.deferred():
        log.time_phase(None)
        for step, batch in zip(range(first, steps + 1), _batches(source, first), strict=False):
            epoch, columns = (step - 1) // len(source), batch.inputs.shape[1]
            keep_mask = to_device(_draw(recipe, step, columns, group.rank), group.device)
            counted = int((batch.targets != IGNORED).sum())
            share = counted if recipe.loss == "mean" else columns
            rules.apply(model, (step - 1) / steps)
            optimizer.zero_grad()
            nats = torch.zeros((), device=group.device)
            log.time_phase("data")
            own = group.columns(columns, recipe.accumulate)
            for i, part in enumerate(own):
                if group.has_shard(part):
                    if recipe.compile is not None:
                        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                    with group.guard_collectives():
                        with autocast:
                            loss = model.loss(shard_batch(batch, part), before[i])
                        log.time_phase("forward")
                        scaler.scale(loss.sum / share).backward()  # type: ignore[no-untyped-call]
                    nats += loss.sum.detach()
                    before[i] = detach_states(loss.states, keep_mask[part]) if keeps_states else None
                    log.time_phase("backward")
            nats = group.reduce_gradients(model, nats, (own[-1].stop - own[0].start) / columns)
            stop, save = (bool(of) for of in group.all_reduce_sum(signals.caught is not None, checkpoints.due))
            scaler.unscale_(optimizer)
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, steps, epoch)
            scaler.step(optimizer)
            scaler.update()
            log.time_phase("optimizer")
            log.step(step, epoch + 1, nats / counted, counted)
            if step in scored:
                with _uncompiled(recipe):
                    _score(setup, recipe, log, best, group, step, epoch + 1)
            if stop or save or step == steps:
                _save(setup, log, checkpoints, group, step, before)
                if group.rank == 0 and not marked:
                    marked = metadata.mark_checkpointed(best.folder)
            if stop and step < steps:
                raise Interrupted(f"interrupted after step {step:,} of {steps:,}", signals.caught or signal.SIGTERM)
            log.time_phase(None)


def report(setup: Setup, config: Config, log: Log, best: BestWeights, device: torch.device) -> None:
    """Score the best weights on the test split, where there is one, and print a sample of theirs."""
    model = LanguageModel(config.model, setup.tokenizer.size).eval()  # whole, where the one in training is sharded
    load_weights(model, best.folder)
    model.to(device)
    if "test" in setup.ids:
        source = batches.scoring(setup.ids["test"], config.data, config.train)
        test = score(model, source, setup.corpus.sizes["test"])
        log.score(best.step, best.epoch, "test", test)
        log.print(f"test: {test}")
    else:
        log.print(f"valid: {best.score} ({setup.corpus.name} has no test split)")
    sample = [int(i) for i in setup.ids["valid"][:SAMPLE_PROMPT]]
    following = generate(
        model, sample, temperature=0.8, top_p=0.95, seed=config.train.seed, sentence=setup.tokenizer.sentence
    )
    sample += [next(following) for _ in range(SAMPLE)]
    log.print(f"a sample, its first {SAMPLE_PROMPT} tokens given:\n\n{setup.tokenizer.decode(sample)}\n")
    log.print(f"{best.folder} keeps {best}, its configuration, tokenizer, metrics and curves")
    log.draw(best.folder / CURVES)
    log.print(next_steps(config, best.folder, list(setup.ids)))


def _describe_extension(config: Config, extended: tuple[int, int], step: int, steps_per_epoch: int) -> str:
    """What an extended run does from here on, in one line."""
    before, now = extended
    rate = learning_rate(config.train, step + 1, now, step // steps_per_epoch)
    return (
        f"extended from {before:,} to {now:,} steps: learning rate and feedback rule follow train.schedule="
        f"{config.train.schedule} and model.feedback={config.model.feedback} over {now:,} steps, so that step "
        f"{step + 1:,} has learning rate {rate:.3g}"
    )


def _batches(source: Source, step: int) -> Iterator[Batch]:
    """The batches of one epoch after the other, beginning with that of a step, counted from 1."""
    epoch, start = divmod(step - 1, len(source))
    while True:
        yield from source.epoch(epoch, start)
        epoch, start = epoch + 1, 0


def _draw(recipe: Train, step: int, columns: int, rank: int) -> Tensor:
    """Everything random in a step is a function of the seed and the step, so that no checkpoint has to hold it.

    Returns:
        Which sequences keep their state at the end of the step, (columns, 1), the same in every process; dropout, which
        torch's generator draws, differs from process to process.
    """
    generator = np.random.default_rng((recipe.seed, step, 1))
    torch.manual_seed(int(generator.integers(2**62)) + rank)
    return torch.from_numpy(generator.random((columns, 1)) >= recipe.state_reset_prob)


def _score(setup: Setup, recipe: Train, log: Log, best: BestWeights, group: Group, step: int, epoch: int) -> None:
    """Score the validation split, save the weights if they are the best, compare their gradient with the exact one."""
    valid = score(setup.model, setup.valid, setup.corpus.sizes["valid"], group)
    log.score(step, epoch, "valid", valid)
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


def _load_kernels(device: torch.device, log: Log) -> None:
    """Load the CPU's kernels, which its first run has to compile, so that no step is charged with it; say if it takes.

    Those of a GPU are compiled one by one when they are launched.
    """
    if device.type != "cpu":
        return
    waiting = threading.Timer(PATIENCE, log.print, ["compiling the kernels for this machine, which is done once"])
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
    setup: Setup, log: Log, checkpoints: Checkpoints, group: Group, step: int, states: list[list[State] | None]
) -> None:
    """Make a checkpoint, unless the last step has ruined the weights: the one before is the last good one then.

    Raises:
        Diverged: when it has.
    """
    log_state = log.state_dict(step)
    if not finite(setup.model, group):
        raise Diverged(f"training diverged (weights after step {step:,}): lower train.lr or change model.feedback")
    own = [state for state in states if state is not None]
    with group.guard_collectives():
        gathered = group.gather(own) if own else None
        checkpoints.save(step, setup.model, setup.optimizer, setup.scaler, gathered, log_state)
