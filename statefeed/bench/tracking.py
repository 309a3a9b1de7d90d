"""``statefeed bench tracking``: state tracking, the parity of a bit string (accuracy, not speed).

A model reads random bits, one a step, and is asked for the parity of all bits so far after every k-th. Credit must pass
through the k steps in between, and a cell must change its state by every bit. Models are trained at length T. They are
evaluated by their last output on other strings of length T and on strings of length 2T. Guessing has an accuracy of
exactly 1/2 on both.

GRU and sLSTM are trained under every rule; minGRU and S4D are linear in their state and have exact gradients only.
The learning rate of every cell and rule is the best of a grid, by the accuracy on validation strings with a seed that
the records do not use.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf
from statefeed.bench.measure import machine_line
from statefeed.bench.options import names, rules_of
from statefeed.bench.tracking_options import BASELINES, CELLS
from statefeed.bench.tracking_options import TrackingOptions as Options
from statefeed.lm.model.baselines import S4D, MinGRU

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_BATCH, _MODES, _RATES, _TUNING_SEED = 64, 16, (3e-3, 1e-2), 0
_EVALUATIONS, _STRINGS, _LEARNT = 20, 512, 0.9


class Model(nn.Module):
    """Bits (T, B) -> logits of the parity of the bits so far, (T, B, 2)."""

    def __init__(self, cell: str, rule: str, width: int) -> None:
        super().__init__()
        baselines: dict[str, Callable[[], nn.Module]] = {
            "mingru": lambda: MinGRU(width),
            "s4d": lambda: S4D(width, _MODES),
        }
        self.embedding = nn.Embedding(2, width)
        self.layer = baselines[cell]() if cell in baselines else getattr(sf, cell.upper())(width, width, feedback=rule)
        self.head = nn.Linear(width, 2)

    def forward(self, bits: Tensor) -> Tensor:
        y, _ = self.layer(self.embedding(bits))
        parity: Tensor = self.head(y)
        return parity


class Strings(NamedTuple):
    """Random strings that no model is trained on, (length, N).

    Attributes:
        valid: of length T, for the choice of the learning rate.
        held_out: of length T, for the records.
        long: of length 2T, for the records.
    """

    valid: Tensor
    held_out: Tensor
    long: Tensor


def strings(T: int, generator: torch.Generator) -> Strings:
    """Each string together with that of the opposite first bit, so that exactly half of the parities are 1."""

    def paired(length: int) -> Tensor:
        bits = torch.randint(2, (length, _STRINGS // 2), generator=generator, device=generator.device)
        return torch.cat([bits, torch.cat([1 - bits[:1], bits[1:]])], 1)

    return Strings(paired(T), paired(T), paired(2 * T))


class Run(NamedTuple):
    """One training run."""

    cell: str
    rule: str
    seed: int
    rate: float


class Evaluation(NamedTuple):
    """Accuracies after a training step."""

    step: int
    valid: float
    held_out: float
    long: float


def train(run: Run, options: Options) -> list[Evaluation]:
    """Train a model and evaluate it, evenly spaced over training and after the last step.

    Args:
        run: what to train; equal seeds have equal strings, and equal cells equal initial weights.
        options: lengths, width, steps and device.
    """
    torch.manual_seed(run.seed)
    model = Model(run.cell, run.rule, options.width).to(options.device)
    generator = torch.Generator().manual_seed(run.seed)
    unseen = Strings(*(part.to(options.device) for part in strings(options.length, generator)))
    optimizer = torch.optim.Adam(model.parameters(), run.rate)
    evaluated = {max(1, options.steps * (k + 1) // _EVALUATIONS) for k in range(_EVALUATIONS)}
    curve = []
    for step in range(1, options.steps + 1):
        drawn = torch.randint(2, (options.length, _BATCH), generator=generator, device=generator.device)
        bits = drawn.to(options.device)
        asked = slice(options.every - 1, None, options.every)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(bits)[asked].flatten(0, 1), parity(bits)[asked].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in evaluated:
            curve.append(Evaluation(step, *(accuracy(model, part) for part in unseen)))
    return curve


def parity(bits: Tensor) -> Tensor:
    """The parity of the bits so far, (T, B)."""
    return bits.cumsum(0) % 2


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], bits: Tensor) -> float:
    """The fraction of the strings ``bits`` (T, B) whose last output is their parity."""
    return float((model(bits)[-1].argmax(-1) == parity(bits)[-1]).float().mean())


def best_rate(cell: str, rule: str, options: Options) -> tuple[float, dict[float, float]]:
    """The learning rate with the highest validation accuracy, averaged over training: one that learns sooner is better.

    Args:
        cell: the cell.
        rule: its rule.
        options: lengths, width, steps and device.

    Returns:
        The rate, and the score of every rate of the grid.
    """
    scores = {
        rate: statistics.mean(e.valid for e in train(Run(cell, rule, _TUNING_SEED, rate), options)) for rate in _RATES
    }
    return max(scores, key=lambda rate: scores[rate]), scores


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Train every cell under every rule that it supports, with every seed.

    Args:
        options: checked options.

    Yields:
        One record per cell, rule and seed; ``learnt`` is the first evaluated step with an accuracy of at least 0.9 on
        strings of length 2T, or None.
    """
    if options.smoke:
        options = dataclasses.replace(options, length=4, every=2, steps=4, width=8)
    for cell in names("cells", options.cells, CELLS):
        for rule in ["bptt"] if cell in BASELINES else rules_of(cell, options.rules):
            rate, scores = best_rate(cell, rule, options)
            for seed in range(1, options.rounds + 1):
                curve = train(Run(cell, rule, seed, rate), options)
                yield {
                    "bench": "tracking",
                    "cell": cell,
                    "variant": rule,
                    "seed": seed,
                    "T": options.length,
                    "every": options.every,
                    "H": options.width,
                    "steps": options.steps,
                    "lr": rate,
                    "rates": scores,
                    "device": options.device,
                    "repeats": options.rounds,
                    "accuracy": curve[-1].held_out,
                    "accuracy_twice": curve[-1].long,
                    "learnt": next((e.step for e in curve if e.long >= _LEARNT), None),
                    "curve": [(e.step, e.held_out, e.long) for e in curve],
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

    T = records[0]["T"]
    result = Table(
        title=f"parity of {T} bits, asked for after every {records[0]['every']}, {records[0]['steps']} training steps",
        caption="accuracy: mean over the seeds (min-max), guessing 0.5; learned: step of the first 90 % at twice T",
    )
    for heading in ("cell", "rule"):
        result.add_column(heading, no_wrap=True)
    for heading in ("rate", "seeds", f"{T} bits", f"{2 * T} bits", "learned by", "learned at step"):
        result.add_column(heading, justify="right", no_wrap=True)
    for (cell, rule), rows in by_case(records).items():
        learned = [r["learnt"] for r in rows if r["learnt"] is not None]
        result.add_row(
            cell,
            rule,
            f"{rows[0]['lr']:g}",
            str(len(rows)),
            *(_ranged([r[key] for r in rows]) for key in ("accuracy", "accuracy_twice")),
            f"{len(learned)} of {len(rows)}",
            f"{statistics.mean(learned):.0f}" if learned else "-",
        )
    return result


def _ranged(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """One panel per cell with one line per rule: accuracy at length 2T over training, mean over seeds."""
    from matplotlib.figure import Figure

    from statefeed.lm.compare.panel import curve
    from statefeed.lm.compare.styles import styles

    cells = list(dict.fromkeys(record["cell"] for record in records))
    result = Figure(figsize=(4 * len(cells), 4), layout="constrained")
    drawn = styles(record["variant"] for record in records)
    for axes, cell in zip(result.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
        for (of, rule), rows in by_case(records).items():
            if of == cell:
                steps = [step for step, *_ in rows[0]["curve"]]
                long = zip(*([accuracy for *_, accuracy in r["curve"]] for r in rows), strict=True)
                curve(axes, steps, [statistics.mean(values) for values in long], drawn[rule], rule)
        axes.set(title=cell, xlabel="training step", ylabel=f"accuracy, {2 * records[0]['T']} bits", ylim=(0.4, 1.02))
        axes.legend(fontsize=7)
    result.suptitle(f"{machine_line(records)}; means over the seeds", fontsize=9)
    return result
