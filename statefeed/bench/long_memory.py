"""Long memory by task, cell and rule: training, choice of the rate, records, table and figure.

A model is one recurrent layer and a linear head on its last output. The learning rate of every cell and rule is the
best of a grid, by the score averaged over a training run with a seed that the records do not use.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import statefeed as sf
from statefeed.bench.adding import Adding
from statefeed.bench.digits import Digits
from statefeed.bench.long_memory_cells import LAYERS
from statefeed.bench.long_memory_options import LongMemoryOptions, rates_of, schedules_of
from statefeed.bench.long_memory_task import Task
from statefeed.bench.measure import machine_line
from statefeed.bench.options import names
from statefeed.bench.recall import Recall
from statefeed.lm.compare.long_memory import HEADINGS, as_score, cases, row

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TASKS: dict[str, type[Task]] = {"adding": Adding, "recall": Recall, "digits": Digits}

_BATCH, _TUNING_SEED, _EVALUATIONS, _EXTENSIONS = 64, 0, 50, 2


class Model(nn.Module):
    """Sequences (T, B, inputs) -> the answer after the last step, (B, outputs)."""

    def __init__(self, cell: str, width: int, task: Task) -> None:
        super().__init__()
        self.layer = LAYERS[cell](task.inputs, width)
        self.head = nn.Linear(width, task.outputs)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.layer(x)[0][-1])
        return answer


class Run(NamedTuple):
    """One training run."""

    cell: str
    rule: str
    seed: int
    rate: float
    tuning: bool = False


class Evaluation(NamedTuple):
    """Score on held-out sequences after a training step, and the processor time of training until then.

    The score is None once the training has diverged: the loss or an output is not finite.
    """

    step: int
    score: float | None
    cpu_seconds: float


def train(run: Run, task: Task, options: LongMemoryOptions) -> list[Evaluation]:
    """Train a model and evaluate it, evenly spaced over training and after the last step.

    Args:
        run: what to train; equal seeds have equal sequences, and equal cells equal initial weights.
        task: the task.
        options: width, steps and device.
    """
    torch.manual_seed(run.seed)
    model = Model(run.cell, options.width, task).to(options.device)
    schedule = sf.Schedule(run.rule)
    generator = torch.Generator().manual_seed(run.seed)
    x, target = (part.to(options.device) for part in task.held_out(run.tuning, generator))
    optimizer = torch.optim.Adam(model.parameters(), run.rate)
    evaluated = sorted({max(1, options.steps * (k + 1) // _EVALUATIONS) for k in range(_EVALUATIONS)})
    curve, seconds = [], 0.0
    for step in range(1, options.steps + 1):
        batch = [part.to(options.device) for part in task.draw(_BATCH, generator)]
        start = time.process_time()
        schedule.apply(model, (step - 1) / options.steps)
        optimizer.zero_grad()
        loss = task.loss(model(batch[0]), batch[1])
        if not loss.isfinite():
            break
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.process_time() - start
        if step in evaluated:
            with torch.no_grad():
                output = model(x)
            score = task.score(output, target) if bool(output.isfinite().all()) else None
            curve.append(Evaluation(step, score, round(seconds, 3)))
    return curve + [Evaluation(step, None, round(seconds, 3)) for step in evaluated[len(curve) :]]


def best_rate(cell: str, rule: str, task: Task, options: LongMemoryOptions) -> tuple[float, dict[float, float | None]]:
    """The learning rate with the best score, averaged over training: one that learns sooner is better.

    Where it is the lowest or the highest of the grid, another one by a factor of two is tried, at most twice.

    Args:
        cell: the cell.
        rule: its rule or schedule.
        task: the task.
        options: rates, width, steps and device.

    Returns:
        The rate, and the score of every rate tried, None if the training diverged; no scores for a grid of one.
    """
    rates, scores = rates_of(options), dict[float, float | None]()
    if len(rates) == 1:
        return rates[0], scores

    def score(rate: float) -> float | None:
        found = [e.score for e in train(Run(cell, rule, _TUNING_SEED, rate, tuning=True), task, options)]
        return None if None in found else statistics.mean(s for s in found if s is not None)

    scores |= {rate: score(rate) for rate in rates}
    best = _best(scores, task)
    for _ in range(_EXTENSIONS):
        if min(scores) < best < max(scores):
            break
        more = 2 * best if best == max(scores) else best / 2
        scores[more] = score(more)
        best = _best(scores, task)
    return best, scores


def _best(scores: Mapping[float, float | None], task: Task) -> float:
    """The rate with the best score; the lowest one if all diverged."""
    finite = {rate: score for rate, score in scores.items() if score is not None}
    if not finite:
        return min(scores)
    return (min if task.metric == "error" else max)(finite, key=lambda rate: finite[rate])


def run(options: LongMemoryOptions) -> Iterator[dict[str, Any]]:
    """Train every cell under every rule that it supports, with every seed.

    Args:
        options: checked options of a task.

    Yields:
        One record per cell, rule and seed. The score after the last step has the name of the task's metric, and is None
        if the training diverged; ``learnt`` is the first evaluated step at which the task was solved, or None, and
        ``cpu_seconds`` the processor time of training until then.
    """
    if options.smoke:
        options = dataclasses.replace(options, length=options.smoke_length, steps=4, width=8)
    task = TASKS[options.task](options.length)
    for cell in names("cells", options.cells, tuple(LAYERS)):
        for rule in schedules_of(cell, options):
            rate, scores = best_rate(cell, rule, task, options)
            for seed in range(1, options.rounds + 1):
                curve = train(Run(cell, rule, seed, rate), task, options)
                solved = next((e for e in curve if e.score is not None and task.is_solved(e.score)), None)
                yield {
                    "bench": options.task,
                    "cell": cell,
                    "variant": rule,
                    "seed": seed,
                    "T": options.length,
                    "H": options.width,
                    "steps": options.steps,
                    "lr": rate,
                    "rates": scores,
                    "device": options.device,
                    "repeats": options.rounds,
                    task.metric: curve[-1].score,
                    "learnt": None if solved is None else solved.step,
                    "cpu_seconds": None if solved is None else solved.cpu_seconds,
                    "curve": curve,
                }


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per cell and rule."""
    from rich.table import Table

    task = TASKS[records[0]["bench"]]
    better = "at most" if task.metric == "error" else "at least"
    result = Table(
        title=f"{task.title} over {records[0]['T']} steps, after {records[0]['steps']} steps of training",
        caption=f"{task.metric} over the seeds, guessing {task.guess:.3f}; solved: {better} {task.solved_at}",
    )
    rate, score, *others = HEADINGS
    for heading in ("cell", "rule"):
        result.add_column(heading, no_wrap=True)
    for heading in (rate, f"{task.metric}, {score}", *others):
        result.add_column(heading, justify="right", no_wrap=True)
    for case, runs in cases(records).items():
        result.add_row(*case, *row(runs))
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """One panel per cell with one line per rule: the score over training, median of the seeds."""
    from matplotlib.figure import Figure

    from statefeed.lm.compare.panel import curve
    from statefeed.lm.compare.styles import styles

    task = TASKS[records[0]["bench"]]
    cells = list(dict.fromkeys(record["cell"] for record in records))
    drawn = styles(record["variant"] for record in records)
    result = Figure(figsize=(6 * len(cells), 4), layout="constrained")
    for axes, cell in zip(result.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
        for (of, rule), runs in cases(records).items():
            if of == cell:
                steps = [step for step, *_ in runs[0]["curve"]]
                scores = zip(*([as_score(value, task.metric) for _, value, _ in r["curve"]] for r in runs), strict=True)
                curve(axes, steps, [statistics.median(values) for values in scores], drawn[rule], rule)
        axes.axhline(task.solved_at, color="gray", linewidth=0.8, linestyle=":")
        axes.set(title=f"{cell}, {records[0]['T']} steps", xlabel="training step", ylabel=task.metric)
        if task.metric == "error":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.02)
        axes.legend(fontsize=7)
    result.suptitle(f"{task.title}; {machine_line(records)}; medians of the seeds", fontsize=9)
    return result
