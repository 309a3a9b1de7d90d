"""``statefeed bench recall``: long-term memory that a GRU learns under every rule (accuracy, not speed).

The first step of a sequence shows one of eight symbols, every later step a random one of eight others, and the last
output must be the first symbol. Guessing has an accuracy of 1/8; credit must pass through all steps in between.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf
from statefeed.bench.measure import machine_line
from statefeed.bench.options import RecallOptions as Options
from statefeed.bench.options import rules_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_SYMBOLS, _WIDTH, _BATCH, _RATE = 8, 64, 64, 1e-2
_HELD_OUT, _EVALUATIONS, _LEARNT = 512, 40, 0.9

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Model(nn.Module):
    """Symbols (T, B) -> logits of the first one, (B, 8)."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.gru = sf.GRU(2 * _SYMBOLS, _WIDTH, feedback=rule)
        self.head = nn.Linear(_WIDTH, _SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        y, _ = self.gru(F.one_hot(symbols, 2 * _SYMBOLS).to(self.head.weight.dtype))
        answer: Tensor = self.head(y[-1])
        return answer


def sequences(T: int, B: int, generator: torch.Generator) -> Tensor:
    """Symbols (T, B): 0 to 7 at the first step, 8 to 15 at the others."""
    symbols = torch.randint(_SYMBOLS, 2 * _SYMBOLS, (T, B), generator=generator, device=generator.device)
    symbols[0] = torch.randint(_SYMBOLS, (B,), generator=generator, device=generator.device)
    return symbols


def train(rule: str, seed: int, delay: int, steps: int, device: str) -> list[tuple[int, float]]:
    """Train a GRU and evaluate it on held-out sequences.

    Args:
        rule: rule of the GRU.
        seed: seed of the initial weights and the sequences, the same for every rule.
        delay: steps between the symbol and the last output.
        steps: training steps.
        device: cpu or cuda.

    Returns:
        (step, accuracy) at evenly spaced evaluations, the last one after the last step.
    """
    torch.manual_seed(seed)
    model = Model(rule).to(device)
    generator = torch.Generator().manual_seed(seed)
    held_out = sequences(delay + 1, _HELD_OUT, generator).to(device)
    optimizer = torch.optim.Adam(model.parameters(), _RATE)
    scored = {max(1, steps * (k + 1) // _EVALUATIONS) for k in range(_EVALUATIONS)}
    curve = []
    for step in range(1, steps + 1):
        symbols = sequences(delay + 1, _BATCH, generator).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(symbols), symbols[0]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in scored:
            with torch.no_grad():
                right = model(held_out).argmax(-1) == held_out[0]
            curve.append((step, float(right.float().mean())))
    return curve


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Train under every rule with every seed.

    Args:
        options: checked options.

    Yields:
        One record per seed and rule; ``learnt`` is the first evaluated step with an accuracy of at least 0.9, or None.
    """
    delay, steps = (2, 4) if options.smoke else (options.delay, options.steps)
    for seed in range(1, options.rounds + 1):
        for rule in rules_of("gru", options.rules):
            curve = train(rule, seed, delay, steps, options.device)
            yield {
                "bench": "recall",
                "cell": "gru",
                "variant": rule,
                "seed": seed,
                "delay": delay,
                "steps": steps,
                "device": options.device,
                "repeats": options.rounds,
                "accuracy": curve[-1][1],
                "learnt": next((step for step, accuracy in curve if accuracy >= _LEARNT), None),
                "curve": curve,
            }


def by_rule(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records grouped by rule."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["variant"], []).append(record)
    return found


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per rule."""
    from rich.table import Table

    result = Table(
        title=f"recall of a symbol over {records[0]['delay']} steps, after {records[0]['steps']} steps of training",
        caption="accuracy: mean over the seeds (min-max), guessing 0.125; learnt: step of the first 90 %",
    )
    result.add_column("rule", no_wrap=True)
    for heading in ("seeds", "accuracy", "learnt by", "learnt at step"):
        result.add_column(heading, justify="right", no_wrap=True)
    for rule, rows in by_rule(records).items():
        accuracy = [r["accuracy"] for r in rows]
        learnt = [r["learnt"] for r in rows if r["learnt"] is not None]
        result.add_row(
            rule,
            str(len(rows)),
            f"{statistics.mean(accuracy):.3f} ({min(accuracy):.3f} to {max(accuracy):.3f})",
            f"{len(learnt)} of {len(rows)}",
            f"{statistics.mean(learnt):.0f}" if learnt else "-",
        )
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """One line per rule: accuracy over training, mean over seeds."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(8, 5), layout="constrained")
    axes = result.add_subplot(xlabel="training step", ylabel="fraction of first symbols recalled", ylim=(0, 1.02))
    for k, (rule, rows) in enumerate(by_rule(records).items()):
        steps = [step for step, _ in rows[0]["curve"]]
        means = [statistics.mean(values) for values in zip(*([a for _, a in r["curve"]] for r in rows), strict=True)]
        axes.plot(
            steps,
            means,
            "-" if k < 10 else "--",
            color=f"C{k % 10}",
            marker=_MARKERS[k % len(_MARKERS)],
            markevery=max(1, len(steps) // 8),
            markersize=4,
            label=rule,
        )
    axes.legend(fontsize=7)
    axes.set_title(f"{machine_line(records)}; means over the seeds", fontsize=9)
    return result
