"""``statefeed bench adding``: the adding problem, long memory by cell and rule (accuracy, not speed).

Every step of a sequence has a number in (0, 1) and a mark, which is 1 at one step of the first half and one of the
second, else 0. The last output must be the sum of the two marked numbers (Hochreiter and Schmidhuber, 1997). Credit
must pass from the end to the marks. Answering 1 always has a squared error of 1/6.

The learning rate of every cell and rule is the best of a grid, by the squared error on sequences with a seed that the
records do not use.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf
from statefeed.bench.adding_options import CELLS, rates_of, schedules_of
from statefeed.bench.adding_options import AddingOptions as Options
from statefeed.bench.measure import machine_line
from statefeed.bench.options import names

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_BATCH, _HELD_OUT, _TUNING_SEED, _EVALUATIONS = 64, 512, 0, 50
SOLVED = 0.01  # squared error

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Model(nn.Module):
    """Numbers and marks (T, B, 2) -> their sum, (B,)."""

    def __init__(self, cell: str, width: int) -> None:
        super().__init__()
        self.layer = getattr(sf, cell.upper())(2, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.layer(x)[0][-1]).squeeze(-1)
        return answer


def sequences(T: int, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers and marks (T, B, 2), and the sums of the marked numbers (B,)."""
    device = generator.device
    values, marks = torch.rand(T, B, generator=generator, device=device), torch.zeros(T, B, device=device)
    first = torch.randint(0, T // 2, (1, B), generator=generator, device=device)
    second = torch.randint(T // 2, T, (1, B), generator=generator, device=device)
    marks.scatter_(0, first, 1.0).scatter_(0, second, 1.0)
    return torch.stack([values, marks], -1), (values * marks).sum(0)


class Run(NamedTuple):
    """One training run."""

    cell: str
    rule: str
    seed: int
    rate: float


class Evaluation(NamedTuple):
    """Squared error on held-out sequences after a training step, and the processor time of training until then."""

    step: int
    error: float
    cpu_seconds: float


def train(run: Run, options: Options) -> list[Evaluation]:
    """Train a model and evaluate it, evenly spaced over training and after the last step.

    Args:
        run: what to train; equal seeds have equal sequences and equal initial weights.
        options: length, width, steps and device.
    """
    torch.manual_seed(run.seed)
    model = Model(run.cell, options.width).to(options.device)
    schedule = sf.Schedule(run.rule)
    generator = torch.Generator().manual_seed(run.seed)
    held_out = [part.to(options.device) for part in sequences(options.length, _HELD_OUT, generator)]
    optimizer = torch.optim.Adam(model.parameters(), run.rate)
    evaluated = {max(1, options.steps * (k + 1) // _EVALUATIONS) for k in range(_EVALUATIONS)}
    curve, seconds = [], 0.0
    for step in range(1, options.steps + 1):
        x, target = (part.to(options.device) for part in sequences(options.length, _BATCH, generator))
        start = time.process_time()
        schedule.apply(model, (step - 1) / options.steps)
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.process_time() - start
        if step in evaluated:
            with torch.no_grad():
                error = float(F.mse_loss(model(held_out[0]), held_out[1]))
            curve.append(Evaluation(step, error, round(seconds, 3)))
    return curve


def best_rate(cell: str, rule: str, options: Options) -> tuple[float, dict[float, float]]:
    """The learning rate with the lowest error, averaged over training: one that learns sooner is better.

    Args:
        cell: the cell.
        rule: its rule or schedule.
        options: rates, length, width, steps and device.

    Returns:
        The rate, and the score of every rate of the grid; no scores for a grid of one.
    """
    rates = rates_of(options)
    if len(rates) == 1:
        return rates[0], {}
    scores = {}
    for rate in rates:
        errors = [e.error for e in train(Run(cell, rule, _TUNING_SEED, rate), options)]
        scores[rate] = statistics.mean(errors)
    return min(scores, key=lambda rate: scores[rate]), scores


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Train every cell under every rule that it supports, with every seed.

    Args:
        options: checked options.

    Yields:
        One record per cell, rule and seed; ``learnt`` is the first evaluated step with a squared error of at most
        0.01, or None, and ``cpu_seconds`` the processor time of training until then.
    """
    if options.smoke:
        options = dataclasses.replace(options, length=6, steps=4, width=8)
    for cell in names("cells", options.cells, CELLS):
        for rule in schedules_of(cell, options):
            rate, scores = best_rate(cell, rule, options)
            for seed in range(1, options.rounds + 1):
                curve = train(Run(cell, rule, seed, rate), options)
                solved = next((e for e in curve if e.error <= SOLVED), None)
                yield {
                    "bench": "adding",
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
                    "error": curve[-1].error,
                    "learnt": None if solved is None else solved.step,
                    "cpu_seconds": None if solved is None else solved.cpu_seconds,
                    "curve": curve,
                }


def by_case(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The records grouped by cell and rule."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["cell"], record["variant"]), []).append(record)
    return found


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per cell and rule."""
    from rich.table import Table

    result = Table(
        title=f"adding problem over {records[0]['T']} steps, after {records[0]['steps']} steps of training",
        caption=f"error: squared, median of the seeds (min-max), guessing 0.167; solved: at most {SOLVED}",
    )
    for heading in ("cell", "rule"):
        result.add_column(heading, no_wrap=True)
    for heading in ("rate", "seeds", "error", "solved by", "solved at step", "CPU seconds"):
        result.add_column(heading, justify="right", no_wrap=True)
    for (cell, rule), rows in by_case(records).items():
        errors, solved = [r["error"] for r in rows], [r for r in rows if r["learnt"] is not None]
        result.add_row(
            cell,
            rule,
            f"{rows[0]['lr']:g}",
            str(len(rows)),
            f"{statistics.median(errors):.4f} ({min(errors):.4f} to {max(errors):.4f})",
            f"{len(solved)} of {len(rows)}",
            *(f"{statistics.mean(r[key] for r in solved):.0f}" if solved else "-" for key in ("learnt", "cpu_seconds")),
        )
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """One panel per cell with one line per rule: error over training, median of the seeds."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(record["cell"] for record in records))
    rules = list(dict.fromkeys(record["variant"] for record in records))
    result = Figure(figsize=(6 * len(cells), 4), layout="constrained")
    for axes, cell in zip(result.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
        for (of, rule), rows in by_case(records).items():
            if of == cell:
                k = rules.index(rule)
                errors = zip(*([error for _, error, _ in r["curve"]] for r in rows), strict=True)
                axes.plot(
                    [step for step, *_ in rows[0]["curve"]],
                    [statistics.median(values) for values in errors],
                    color=f"C{k % 10}",
                    marker=_MARKERS[k % len(_MARKERS)],
                    markevery=5,
                    markersize=4,
                    label=rule,
                )
        axes.axhline(SOLVED, color="gray", linewidth=0.8, linestyle=":")
        axes.set(title=f"{cell}, {records[0]['T']} steps", xlabel="training step", ylabel="squared error", yscale="log")
        axes.legend(fontsize=7)
    result.suptitle(f"{machine_line(records)}; medians of the seeds", fontsize=9)
    return result
