"""The log of a run: metrics.jsonl, and a progress bar or lines of text on standard output."""

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from statefeed.lm.errors import Diverged, UsageError
from statefeed.lm.run import curves, memory, output, tensorboard
from statefeed.lm.run.agreement import Agreement
from statefeed.lm.run.evaluate import Score, perplexity
from statefeed.lm.run.phases import PhaseTimer

TRAIN_ROWS = 200  # rows of the training split in a run: enough for a smooth curve, few enough to read


class Log:
    """The log of one run, a context manager; every row is written to the file immediately.

    Args:
        path: metrics.jsonl, which must be empty unless the run is resumed; None prints and writes nothing.
        steps: number of optimizer steps of the run.
        state: `state_dict` of the log at the checkpoint of a resumed run, empty if it has no checkpoint; later rows
            are removed from the file.
        board: folder of the same metrics for TensorBoard; None writes none.
        device: device of the run.
        place: machine and threads of the run, for the figure.
    """

    def __init__(
        self,
        path: Path | None,
        steps: int,
        state: Mapping[str, Any] | None = None,
        board: Path | None = None,
        device: torch.device | None = None,
        place: str = "",
    ) -> None:
        self._where = place
        self._gpu = device is not None and device.type == "cuda"
        self._curves: dict[str, list[tuple[int, float]]] = {"train": [], "valid": [], "test": [], "alignment": []}
        self._steps = steps
        self._every = max(1, steps // TRAIN_ROWS)
        self._loss = self._speed = math.nan  # of the last row
        if path and state and (not path.exists() or path.stat().st_size < state["bytes"]):
            raise UsageError(
                f"{path} is shorter than when the checkpoint was made: the run cannot be resumed without it"
            )
        self._path = path
        if path and state is None and path.exists() and path.stat().st_size:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self._file = Path(path or os.devnull).open("a+", encoding="utf-8")  # noqa: SIM115
        state = state or {"bytes": 0, "seconds": 0.0, "losses": [], "tokens": 0, "phases": None}
        self._losses: list[Tensor | float] = list(state["losses"])  # of the steps since the last row
        self._tokens: int = state["tokens"]
        self._timer = PhaseTimer(self._gpu, state["phases"])
        self._before: float = state["seconds"]
        if path:
            try:
                self._read_back(path, state["bytes"])
            except BaseException:
                self._file.close()
                raise
        done = max((step for curve in self._curves.values() for step, _ in curve), default=0)
        self._board = (
            None if path is None or board is None else tensorboard.writer_class()(str(board), purge_step=done + 1)
        )
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  {task.fields[state]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=output.console(soft_wrap=True, quiet=path is None),
            transient=True,
            disable=path is None or not output.is_terminal(),
        )
        self._task = self._bar.add_task("", total=steps, completed=done, state=self._state())

    def _read_back(self, path: Path, until: int) -> None:
        """Read the rows before the checkpoint and remove those after it.

        Raises:
            UsageError: a row is corrupt.
        """
        try:
            for row in map(json.loads, path.read_bytes()[:until].splitlines()):
                self._curves[row["split"]].append((row["step"], row["loss"]))
                if row["split"] == "train":
                    self._loss, self._speed = row["loss"], row["tokens_per_s"]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} is broken: a row before the checkpoint is not what was written ({error!r}), and the run "
                "cannot be resumed without it"
            ) from error
        self._file.truncate(until)
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> "Log":
        self._bar.start()
        if not self._gpu:
            memory.reset_peak()
        self._timer.time_phase(None)
        self._started = time.perf_counter() - self._before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()
        self._file.close()

    def _state(self) -> str:
        """Loss and speed of the last row, for the progress bar; nothing before the first row."""
        return "" if math.isnan(self._loss) else f"loss {self._loss:.3f}  {self._speed:,.0f} tokens/s "

    def print(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._bar.console.print(line)

    def time_phase(self, phase: str | None) -> None:
        """Add the time since the last call to a phase of the step; None discards it, for example that of a score."""
        self._timer.time_phase(phase)

    def step(self, step: int, epoch: int, loss: Tensor | float, tokens: int) -> None:
        """Add one optimizer step; several steps make one row with their mean loss.

        Args:
            step: step number, from 1.
            epoch: epoch number, from 1.
            loss: nats per token; a tensor is read when its row is written, so that no step synchronizes with the GPU.
            tokens: number of predicted tokens.

        Raises:
            Diverged: the perplexity of a step of the row is not finite.
        """
        self._losses.append(loss)
        self._tokens += tokens
        if step % self._every == 0 or step == self._steps:
            losses, phases = self._finite_losses(step), self._timer.seconds()
            self._loss = sum(losses) / len(losses)
            self._speed = self._tokens / max(sum(phases.values()), 1e-9)
            ms = {f"{phase}_ms": round(1e3 * seconds / len(losses), 3) for phase, seconds in phases.items()}
            self._row(step, epoch, "train", self._loss, self._speed, **ms)
            self._losses, self._tokens = [], 0
            self._timer.reset()
        self._bar.update(self._task, completed=step, state=self._state())

    def score(self, step: int, epoch: int, split: str, score: Score, **more: float) -> None:
        """Add the score of a split, and ``more`` about the same pass.

        Raises:
            Diverged: its perplexity is not finite.
        """
        _check_finite(score.loss, step)
        speed = score.tokens / score.seconds
        self._row(step, epoch, split, score.loss, speed, bits_per_byte=score.bits_per_byte, **more)
        if split == "valid":
            remaining = (time.perf_counter() - self._started) / step * (self._steps - step)
            self.print(
                f"step {step:,} of {self._steps:,}: train loss {self._loss:.3f}, valid loss {score.loss:.3f}, "
                f"perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits per byte, "
                f"{self._speed:,.0f} tokens/s, {remaining:.0f} s left"
            )

    def log_alignment(self, step: int, epoch: int, found: Agreement, tokens: int) -> None:
        """Add the agreement of the gradient with the exact one."""
        alignment = {"cosine": found.cosine, "norm_ratio": found.norm_ratio}
        self._row(step, epoch, "alignment", found.loss, tokens / found.seconds, **alignment)

    def state_dict(self, step: int) -> dict[str, Any]:
        """The state of the log for resuming after this step; all rows so far are flushed to disk.

        Raises:
            Diverged: the perplexity of a step since the last row is not finite.
        """
        losses = self._finite_losses(step)
        if self._path:
            os.fsync(self._file.fileno())
        return {
            "bytes": os.fstat(self._file.fileno()).st_size,
            "seconds": time.perf_counter() - self._started,
            "losses": losses,
            "tokens": self._tokens,
            "phases": self._timer.seconds(),
        }

    def draw(self, path: Path) -> None:
        """Plot the learning curves into a PNG file."""
        curves.draw(self._curves, path, self._where)

    def _finite_losses(self, step: int) -> list[float]:
        """The losses since the last row; raises if training diverged."""
        losses = [float(loss) for loss in self._losses]
        for place, loss in enumerate(losses, step - len(losses) + 1):
            _check_finite(loss, place)
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
        """Peak memory of this process since the log was entered, or of the GPU if the run uses one."""
        return torch.cuda.max_memory_allocated() if self._gpu else memory.peak_bytes()


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(perplexity(loss)):
        raise Diverged(f"training diverged (loss {loss} at step {step:,}): lower train.lr or change model.feedback")
