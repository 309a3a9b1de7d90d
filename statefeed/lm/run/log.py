"""Owns what a run tells: metrics.jsonl, a progress bar on a terminal and plain lines elsewhere, and curves.png."""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeAlias

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from statefeed.lm.config import UsageError
from statefeed.lm.run.agreement import Agreement
from statefeed.lm.run.endings import Diverged
from statefeed.lm.run.evaluate import Score, perplexity

TRAIN_ROWS = 200  # of a whole run: enough for a smooth curve, few enough to read
PHASES = ("data", "forward", "backward", "optimiser")  # of a step

Mark: TypeAlias = Any  # a point in time: seconds, or on a GPU an event in the order of its work


class Log:
    """The record of one run, used as a context; rows are written as they come and survive whatever follows.

    Args:
        path: metrics.jsonl, which must not exist unless the run goes on; None says and writes nothing.
        steps: how many optimizer steps there will be.
        memory: of the log of a run that goes on, empty where it goes on from its beginning: rows behind it are dropped.
        tensorboard: folder of the same metrics for TensorBoard.
        device: that the steps run on.
    """

    def __init__(
        self,
        path: Path | None,
        steps: int,
        memory: Mapping[str, Any] | None = None,
        tensorboard: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._gpu = device is not None and device.type == "cuda"
        self._curves: dict[str, list[tuple[int, float]]] = {"train": [], "valid": [], "test": [], "alignment": []}
        self._steps = steps
        self._every = max(1, steps // TRAIN_ROWS)
        self._loss = self._speed = math.nan  # of the last row
        if path and memory and (not path.exists() or path.stat().st_size < memory["bytes"]):
            raise UsageError(f"{path} is shorter than when the checkpoint was made: the run cannot go on without it")
        self._path = path
        mode = "x+" if path and memory is None else "a+"
        self._file = Path(path or os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
        memory = memory or {"bytes": 0, "seconds": 0.0, "losses": [], "tokens": 0, "laps": dict.fromkeys(PHASES, 0.0)}
        self._losses: list[Tensor | float] = list(memory["losses"])  # of the steps since the last row
        self._tokens: int = memory["tokens"]
        self._laps: dict[str, float] = dict(memory["laps"])
        self._marks: list[tuple[str, Mark, Mark]] = []  # of laps that are not added up yet
        self._before: float = memory["seconds"]
        if path:
            try:
                _claim(self._file, path.parent)
                self._read_back(path, memory["bytes"])
            except BaseException:
                self._file.close()
                raise
        done = max((step for curve in self._curves.values() for step, _ in curve), default=0)
        self._board = (
            None if path is None or tensorboard is None else board_writer()(str(tensorboard), purge_step=done + 1)
        )
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s "),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(highlight=False, soft_wrap=True, quiet=path is None),
            transient=True,
            disable=path is None or not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=steps, completed=done, loss=self._loss, speed=self._speed)

    def _read_back(self, path: Path, until: int) -> None:
        """Read the rows before the checkpoint and drop those behind it.

        Raises:
            UsageError: when the rows are not what was written.
        """
        try:
            for row in map(json.loads, path.read_bytes()[:until].splitlines()):
                self._curves[row["split"]].append((row["step"], row["loss"]))
                if row["split"] == "train":
                    self._loss, self._speed = row["loss"], row["tokens_per_s"]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} is broken: a row before the checkpoint is not what was written ({error!r}), and the run "
                "cannot go on without it"
            ) from error
        self._file.truncate(until)
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> "Log":
        self._bar.start()
        if not self._gpu:
            _forget_peak()
        self._lap = self._mark()
        self._started = time.perf_counter() - self._before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()
        self._file.close()

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        self._bar.console.print(line, markup=False)

    def lap(self, phase: str | None) -> None:
        """Add the time since the last call to a phase of the step; None leaves it out, as that of a score.

        A GPU works behind the calls: its own time is taken, between events in its queue, and no step waits for it.
        """
        now = self._mark()
        if phase is not None:
            self._marks.append((phase, self._lap, now))
        self._lap = now

    def _mark(self) -> Mark:
        if not self._gpu:
            return time.perf_counter()
        event: Mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _timed(self) -> dict[str, float]:
        """Seconds of every phase since the last row."""
        if self._gpu and self._marks:
            self._marks[-1][-1].synchronize()
        for phase, start, stop in self._marks:
            self._laps[phase] += 1e-3 * start.elapsed_time(stop) if self._gpu else stop - start
        self._marks = []
        return self._laps

    def step(self, step: int, epoch: int, loss: Tensor | float, tokens: int) -> None:
        """Take note of one optimizer step; every few of them make one row, with their mean loss.

        Args:
            step: counted from 1.
            epoch: counted from 1.
            loss: nats per token; a tensor is read when its row is made, so that no step waits for the device.
            tokens: that were predicted.

        Raises:
            Diverged: when a loss of the row has no perplexity.
        """
        self._losses.append(loss)
        self._tokens += tokens
        if step % self._every == 0 or step == self._steps:
            losses, laps = self._checked(step), self._timed()
            self._loss = sum(losses) / len(losses)
            self._speed = self._tokens / max(sum(laps.values()), 1e-9)
            ms = {f"{phase}_ms": round(1e3 * seconds / len(losses), 3) for phase, seconds in laps.items()}
            self._row(step, epoch, "train", self._loss, self._speed, **ms)
            self._losses, self._tokens, self._laps = [], 0, dict.fromkeys(PHASES, 0.0)
        self._bar.update(self._task, completed=step, loss=self._loss, speed=self._speed)

    def score(self, step: int, epoch: int, split: str, score: Score) -> None:
        """Take note of the score of a split.

        Raises:
            Diverged: when its loss has no perplexity.
        """
        _check(score.loss, step)
        self._row(step, epoch, split, score.loss, score.tokens / score.seconds, bits_per_byte=score.bits_per_byte)
        if split == "valid":
            left = (time.perf_counter() - self._started) / step * (self._steps - step)
            self.say(
                f"step {step:,} of {self._steps:,}: train loss {self._loss:.3f}, valid loss {score.loss:.3f}, "
                f"perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits per byte, "
                f"{self._speed:,.0f} tokens/s, {left:.0f} s left"
            )

    def align(self, step: int, epoch: int, found: Agreement, tokens: int) -> None:
        """Take note of how the gradient agrees with the exact one."""
        alignment = {"cosine": found.cosine, "norm_ratio": found.norm_ratio}
        self._row(step, epoch, "alignment", found.loss, tokens / found.seconds, **alignment)

    def memory(self, step: int) -> dict[str, Any]:
        """What a log has to be given so that it goes on from this step; all rows so far are on disk after it.

        Raises:
            Diverged: when a loss since the last row has no perplexity.
        """
        losses = self._checked(step)
        if self._path:
            os.fsync(self._file.fileno())
        return {
            "bytes": os.fstat(self._file.fileno()).st_size,
            "seconds": time.perf_counter() - self._started,
            "losses": losses,
            "tokens": self._tokens,
            "laps": self._timed(),
        }

    def _checked(self, step: int) -> list[float]:
        """The losses since the last row."""
        losses = [float(loss) for loss in self._losses]
        for place, loss in enumerate(losses, step - len(losses) + 1):
            _check(loss, place)
        return losses

    def _row(self, step: int, epoch: int, split: str, loss: float, speed: float, **more: float) -> None:
        row = {"step": step, "epoch": epoch, "split": split, "loss": loss, "perplexity": perplexity(loss), **more}
        seconds = time.perf_counter() - self._started
        row |= {"tokens_per_s": round(speed, 1), "seconds": round(seconds, 3), "peak_bytes": self._peak_bytes()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._curves[split].append((step, loss))
        if self._board is not None:
            for key in row.keys() - {"step", "split"}:
                self._board.add_scalar(f"{split}/{key}", row[key], step)

    def _peak_bytes(self) -> int | None:
        """The most memory that this process has held since the log was entered; that of the GPU where one is used."""
        return torch.cuda.max_memory_allocated() if self._gpu else _peak_bytes()

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


def _claim(file: IO[str], folder: Path) -> None:
    """Keep every other process from going on with the run for as long as the file is open.

    Raises:
        UsageError: when another one does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder} is being trained by another process: wait for its end, or end it") from None
    except OSError:  # a file system without locks
        return


def _forget_peak() -> None:
    """Let the system count the most memory from here on, where it can: reading and cutting the text may take more."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int | None:
    """The most memory that this process has held, None where the system does not tell."""
    with contextlib.suppress(OSError):  # where the system is Linux: what a parent held at a fork does not count there
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _check(loss: float, step: int) -> None:
    if not math.isfinite(perplexity(loss)):
        raise Diverged(f"training diverged (loss {loss} at step {step:,}): lower train.lr or change model.feedback")


def board_writer() -> Any:
    """TensorBoard's class of writers.

    Raises:
        UsageError: when it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError('run.tensorboard needs TensorBoard: pip install "statefeed[tensorboard]"') from None
    return SummaryWriter
