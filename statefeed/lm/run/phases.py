"""The time of a step by phase."""

import time
from typing import Any, TypeAlias

import torch

PHASES = ("data", "forward", "backward", "optimizer")  # of a step

Mark: TypeAlias = Any  # a point in time: seconds, or on a GPU an event in the order of its work


class PhaseTimer:
    """Adds up the seconds of every phase.

    A GPU works asynchronously: its own time is taken, between events in its queue, and no step waits for it.

    Args:
        gpu: whether the steps run on a GPU.
        seconds: of every phase so far.
    """

    def __init__(self, gpu: bool, seconds: dict[str, float] | None = None) -> None:
        self._gpu = gpu
        self._seconds = dict(seconds or dict.fromkeys(PHASES, 0.0))
        self._intervals: list[tuple[str, Mark, Mark]] = []  # not added up yet
        self._last = self._mark()

    def time_phase(self, phase: str | None) -> None:
        """Add the time since the last call to a phase; None leaves it out."""
        now = self._mark()
        if phase is not None:
            self._intervals.append((phase, self._last, now))
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase since the last `reset`; on a GPU this waits for the last phase."""
        if self._gpu and self._intervals:
            self._intervals[-1][-1].synchronize()
        for phase, start, stop in self._intervals:
            self._seconds[phase] += 1e-3 * start.elapsed_time(stop) if self._gpu else stop - start
        self._intervals = []
        return self._seconds

    def reset(self) -> None:
        """Begin at zero again."""
        self._seconds, self._intervals = dict.fromkeys(PHASES, 0.0), []

    def _mark(self) -> Mark:
        if not self._gpu:
            return time.perf_counter()
        event: Mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
