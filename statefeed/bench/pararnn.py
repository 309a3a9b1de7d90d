"""``python -m statefeed.bench.pararnn``: sf.GRU against the ParaGRU of the package pararnn-torch.

ParaGRU has a diagonal recurrence, so that Newton's method computes its states and exact gradients in parallel over
time. sf.GRU has torch's dense recurrence. Compared are a training step, and what a model has learned after equal
processor time: recall of a symbol (the task of ``statefeed bench recall``) and the text of pydoc (two layers of the
trainer's language model). Every contender has the best of a grid of learning rates, by its score with a seed that the
records do not use.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf
from statefeed.bench import recall
from statefeed.bench.measure import Seconds, clock, environment, interleaved, spread
from statefeed.bench.options import FEWEST_REPEATS, OptionError, Shape, check_folder, names, shapes
from statefeed.bench.records import written
from statefeed.lm import config
from statefeed.lm.data import batches, cache, corpora
from statefeed.lm.model.language_model import LanguageModel

PARAGRU, NEWTON = "paragru", "dsf newton"
CONTENDERS = (PARAGRU, "bptt", "dsf", NEWTON)
TASKS = ("step", "recall", "pydoc")
SHAPES = "256x8x256,1024x8x256,4096x8x256"
RATES = (3e-3, 1e-2)
_TUNING_SEED, _EVALUATIONS = 0, 10
_DELAY, _WIDTH, _SYMBOLS = 24, 64, 8
_LAYERS, _BATCH, _CONTEXT = 2, 8, 256


class ParaGRU(nn.Module):
    """The package's ParaGRU with the call of an sf.GRU of one layer."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        pararnn = importlib.import_module("pararnn")
        cell = pararnn.ParaGRU(inputs, width)
        self.layer = pararnn.ParaRNN(cell, batch_first=False, return_hidden=True)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, state = self.layer(x, None if state is None else state[0])
        return y, state[None]


def make(contender: str, inputs: int, width: int) -> nn.Module:
    """The recurrent layer of a contender."""
    if contender == PARAGRU:
        return ParaGRU(inputs, width)
    layer = sf.GRU(inputs, width, feedback=contender.split()[0])
    layer.forward_method = sf.Newton(1e-3) if contender == NEWTON else "sequential"
    return layer


def step(contenders: Sequence[str], shape: Shape, rounds: int) -> dict[str, Any]:
    """Milliseconds of a training step of one layer, I = H, in turns."""
    torch.manual_seed(1)
    x = torch.randn(*shape, device="cpu", requires_grad=True)

    def runner(contender: str) -> Callable[[], Seconds]:
        torch.manual_seed(0)
        layer = make(contender, shape.H, shape.H)

        def run() -> Seconds:
            start = clock("cpu")
            y, _ = layer(x)
            torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])
            return (clock("cpu") - start,)

        return run

    turns = interleaved({name: runner(name) for name in contenders}, rounds)
    T, B, H = shape
    return {
        "task": "step",
        "T": T,
        "B": B,
        "H": H,
        "repeats": rounds,
        "ms": {name: spread([1e3 * s for (s,) in values]) for name, values in turns.items()},
    }


class Run(NamedTuple):
    """One training run of a task."""

    contender: str
    seed: int
    rate: float
    cpu_seconds: float


class Evaluation(NamedTuple):
    """Score on held-out data, with the steps and the processor time of training until then."""

    step: int
    cpu_seconds: float
    score: float


def train(
    model: nn.Module, losses: Iterator[Callable[[], Tensor]], score: Callable[[], float], run: Run
) -> list[Evaluation]:
    """Train for a processor time, and evaluate at evenly spaced times and at the end.

    Args:
        model: its parameters are trained by Adam, with a norm of the gradients of at most 1.
        losses: computes the loss of every step.
        score: evaluates the model.
        run: learning rate and processor time, without that of evaluations.
    """
    optimizer = torch.optim.Adam(model.parameters(), run.rate)
    curve: list[Evaluation] = []
    seconds = 0.0
    for number, loss in enumerate(losses, 1):
        start = time.process_time()
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.process_time() - start
        if seconds >= run.cpu_seconds * (len(curve) + 1) / _EVALUATIONS:
            model.eval()
            with torch.no_grad():
                curve.append(Evaluation(number, round(seconds, 3), score()))
            model.train()
        if seconds >= run.cpu_seconds:
            break
    return curve


def train_recall(run: Run) -> list[Evaluation]:
    """The fraction of first symbols recalled; one layer of 64 units."""
    torch.manual_seed(run.seed)
    layer, head = make(run.contender, 2 * _SYMBOLS, _WIDTH), nn.Linear(_WIDTH, _SYMBOLS)
    generator = torch.Generator().manual_seed(run.seed)
    held_out = recall.sequences(_DELAY + 1, 512, generator)

    def logits(symbols: Tensor) -> Tensor:
        answer: Tensor = head(layer(F.one_hot(symbols, 2 * _SYMBOLS).to(head.weight.dtype))[0][-1])
        return answer

    def losses() -> Iterator[Callable[[], Tensor]]:
        while True:
            symbols = recall.sequences(_DELAY + 1, 64, generator)
            yield lambda symbols=symbols: F.cross_entropy(logits(symbols), symbols[0])  # type: ignore[misc]

    def score() -> float:
        return float((logits(held_out).argmax(-1) == held_out[0]).float().mean())

    return train(nn.ModuleList([layer, head]), losses(), score, run)


def train_pydoc(run: Run) -> list[Evaluation]:
    """Nats per token of the validation text; state is passed from one context of 256 tokens to the next."""
    data = config.Data(corpus="pydoc", tokens="bpe", vocabulary=2048)
    splits = corpora.read(data).splits
    tokenizer = cache.tokenizer(data, splits)
    text, valid = (cache.encode(tokenizer, splits[split]) for split in ("train", "valid"))
    recipe = config.Train(batch=_BATCH, context=_CONTEXT)
    torch.manual_seed(run.seed)
    model = LanguageModel(config.Model(cell="gru", layers=_LAYERS, width=256), tokenizer.size)
    for block in model.blocks:
        block.rnn = make(run.contender, 256, 256)

    def losses() -> Iterator[Callable[[], Tensor]]:
        states: list[Any] | None = None
        source = batches.training(text, data, recipe)
        for batch in itertools.chain.from_iterable(source.epoch(epoch) for epoch in itertools.count()):

            def loss(batch: batches.Batch = batch) -> Tensor:
                nonlocal states
                found = model.loss(batch, states)
                states = [state.detach() for state in found.states]
                return found.mean

            yield loss

    def score() -> float:
        total, count, states = 0.0, 0, None
        for batch in batches.scoring(valid, data, recipe).epoch(0):
            found = model.loss(batch, states)
            total, count, states = total + float(found.sum), count + found.tokens, found.states
        return total / count

    return train(model, losses(), score, run)


# How to train for a task, and whether a higher score is better.
_TRAINED = {"recall": (train_recall, True), "pydoc": (train_pydoc, False)}


def learned(task: str, contender: str, seeds: int, cpu_seconds: float) -> Iterator[dict[str, Any]]:
    """One record per seed of what a contender learns in equal time."""
    trained, higher = _TRAINED[task]
    scores = {}
    for rate in RATES:
        curve = trained(Run(contender, _TUNING_SEED, rate, cpu_seconds))
        scores[rate] = statistics.mean(e.score for e in curve)  # one that learns sooner is better
    rate = (max if higher else min)(RATES, key=lambda rate: scores[rate])
    for seed in range(1, seeds + 1):
        curve = trained(Run(contender, seed, rate, cpu_seconds))
        yield {
            "task": task,
            "contender": contender,
            "seed": seed,
            "lr": rate,
            "rates": scores,
            "steps": curve[-1].step,
            "cpu_seconds": curve[-1].cpu_seconds,
            "score": curve[-1].score,
            "curve": curve,
        }


def run(flags: argparse.Namespace, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run the tasks and write each record immediately."""
    metadata = {**environment(argv, "cpu"), "command": f"python -m statefeed.bench.pararnn {' '.join(argv)}".rstrip()}

    def records() -> Iterator[dict[str, Any]]:
        for task in flags.tasks:
            if task == "step":
                yield from (step(flags.contenders, shape, flags.repeats) for shape in flags.shapes)
            else:
                for contender in flags.contenders:
                    yield from learned(task, contender, flags.seeds, flags.cpu_seconds)

    return written(({"bench": "pararnn", **record, **metadata} for record in records()), flags.output)


def main(argv: Sequence[str]) -> int:
    """Measure, write the records and print one line for each.

    Returns:
        Exit code: 0; 2 for invalid flags and without the package.
    """
    parser = argparse.ArgumentParser(prog="python -m statefeed.bench.pararnn", description=__doc__, allow_abbrev=False)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--contenders", default=",".join(CONTENDERS[:3]), help=", ".join(CONTENDERS))
    parser.add_argument("--shapes", default=SHAPES, help="of step: steps x sequences x width, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="of recall and pydoc")
    parser.add_argument("--cpu-seconds", type=float, default=60.0, help="of every run of recall and pydoc")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="of step")
    parser.add_argument("--output", type=Path, default=Path("pararnn.jsonl"), help="JSONL file, overwritten")
    flags = parser.parse_args(argv)
    try:
        check_folder(flags.output)
        if flags.repeats < FEWEST_REPEATS or min(flags.threads, flags.seeds) < 1 or not flags.cpu_seconds > 0:
            least = f"repeats must be at least {FEWEST_REPEATS}, threads and seeds at least 1, cpu-seconds above 0"
            raise OptionError(least)
        flags.contenders = names("contenders", flags.contenders, CONTENDERS)
        flags.tasks, flags.shapes = names("tasks", flags.tasks, TASKS), shapes(flags.shapes)
        if PARAGRU in flags.contenders and importlib.util.find_spec("pararnn") is None:
            raise OptionError(
                "paragru needs the package pararnn-torch, which is not installed: leave it out, or install it"
            )
    except OptionError as error:
        parser.error(str(error))
    torch.set_num_threads(flags.threads)
    for record in run(flags, argv):
        if record["task"] == "step":
            for name, ms in record["ms"].items():
                print(f"{record['T']}x{record['B']}x{record['H']} {name:12} {ms['median']:9.1f} ms", flush=True)
        else:
            who = f"{record['task']} {record['contender']:12} seed {record['seed']} lr {record['lr']:g}"
            print(f"{who}: {record['score']:.4f} after {record['steps']} steps", flush=True)
    print(f"records in {flags.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
