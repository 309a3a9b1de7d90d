"""Owns what a run tells: metrics.jsonl, a progress bar on a terminal and plain lines elsewhere, and curves.png."""

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from statefeed.lm.agreement import Agreement
from statefeed.lm.evaluate import Score, perplexity

TRAIN_ROWS = 200  # of a whole run: enough for a smooth curve, few enough to read


class Log:
    """The record of one run, used as a context; rows are written as they come and survive whatever follows.

    Args:
        path: metrics.jsonl, which must not exist.
        steps: how many optimizer steps there will be.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self._file = path.open("x", encoding="utf-8")
        self._curves: dict[str, list[tuple[int, float]]] = {
            "train": [],
            "valid": [],
            "test": [],
            "alignment": [],
        }
        self._steps = steps
        self._every = max(1, steps // TRAIN_ROWS)
        self._window: list[float] = []
        self._window_tokens = 0
        self._loss = self._speed = math.nan  # of the last row
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s "),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(highlight=False, soft_wrap=True),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=steps, loss=math.nan, speed=math.nan)

    def __enter__(self) -> "Log":
        self._bar.start()
        self._started = self._window_started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._file.close()

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        self._bar.console.print(line, markup=False)

    def step(self, step: int, epoch: int, loss: float, tokens: int) -> None:
        """Take note of one optimizer step; every few of them make one row, with their mean loss."""
        self._window.append(loss)
        self._window_tokens += tokens
        if step % self._every == 0 or step == self._steps:
            now = time.perf_counter()
            self._loss = sum(self._window) / len(self._window)
            self._speed = self._window_tokens / (now - self._window_started)
            self._row(step, epoch, "train", self._loss, self._speed)
            self._window, self._window_tokens, self._window_started = [], 0, now
        self._bar.update(self._task, completed=step, loss=loss, speed=self._speed)

    def score(self, step: int, epoch: int, split: str, score: Score) -> None:
        """Take note of the score of a split; its time does not count as training time."""
        self._window_started += score.seconds
        self._row(step, epoch, split, score.loss, score.tokens / score.seconds, bits_per_byte=score.bits_per_byte)
        if split == "valid":
            left = (time.perf_counter() - self._started) / step * (self._steps - step)
            self.say(
                f"step {step:,} of {self._steps:,}: train loss {self._loss:.3f}, valid loss {score.loss:.3f}, "
                f"perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits per byte, "
                f"{self._speed:,.0f} tokens/s, {left:.0f} s left"
            )

    def align(self, step: int, epoch: int, found: Agreement, tokens: int) -> None:
        """Take note of how the gradient agrees with the exact one; its time does not count as training time."""
        self._window_started += found.seconds
        alignment = {"cosine": found.cosine, "norm_ratio": found.norm_ratio}
        self._row(step, epoch, "alignment", found.loss, tokens / found.seconds, **alignment)

    def _row(self, step: int, epoch: int, split: str, loss: float, speed: float, **more: float) -> None:
        row = {"step": step, "epoch": epoch, "split": split, "loss": loss, "perplexity": perplexity(loss), **more}
        seconds = time.perf_counter() - self._started
        self._file.write(json.dumps({**row, "tokens_per_s": round(speed, 1), "seconds": round(seconds, 3)}) + "\n")
        self._file.flush()
        self._curves[split].append((step, loss))

    def draw(self, path: Path) -> None:
        """Draw the losses over the steps."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        for split, style in (("train", "-"), ("valid", "o-"), ("test", "s")):
            if self._curves[split]:
                axes.plot(*zip(*self._curves[split], strict=True), style, label=split, markersize=4)
                axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
