"""Timer of the phases of a step."""

import time
from typing import Any, TypeAlias

import torch

PHASES = ("data", "forward", "backward", "optimizer")

Mark: TypeAlias = Any  # a point in time: seconds on a CPU, a CUDA event on a GPU


class PhaseTimer:
    """Sums the seconds of every phase.

    On a GPU, time is measured between CUDA events in its stream, so that no step synchronizes.

    Args:
        gpu: whether the steps run on a GPU.
        seconds: initial seconds of every phase; zero if None.
    """

    def __init__(self, gpu: bool, seconds: dict[str, float] | None = None) -> None:
        self._gpu = gpu
        self._seconds = dict(seconds or dict.fromkeys(PHASES, 0.0))
        self._intervals: list[tuple[str, Mark, Mark]] = []  # not added up yet
        self._last = self._mark()

    def time_phase(self, phase: str | None) -> None:
        """Add the time since the last call to a phase; None discards it."""
        now = self._mark()
        if phase is not None:
            self._intervals.append((phase, self._last, now))
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase since the last `reset`; on a GPU this synchronizes with the last phase."""
        if self._gpu and self._intervals:
            self._intervals[-1][-1].synchronize()
        for phase, start, stop in self._intervals:
            self._seconds[phase] += 1e-3 * start.elapsed_time(stop) if self._gpu else stop - start
        self._intervals = []
        return self._seconds

    def reset(self) -> None:
        """Set the seconds of every phase to zero."""
        self._seconds, self._intervals = dict.fromkeys(PHASES, 0.0), []

    def _mark(self) -> Mark:
        if not self._gpu:
            return time.perf_counter()
        event: Mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
