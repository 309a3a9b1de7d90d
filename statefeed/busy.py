"""How many processors other processes use while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE = (3, 4)  # the columns of idle time and of waiting for a disk
_COUNTED = 8  # user, nice, system, idle, iowait, irq, softirq, steal
_BUSY_ABOVE = 0.15  # processors


class OtherLoad:
    """The processors that other processes use from the construction of this object on.

    Example:
        >>> load = OtherLoad()
        >>> load.processors() is None or load.processors() >= 0
        True
    """

    def __init__(self) -> None:
        self._began = time.monotonic(), all_seconds(), own_seconds()

    def processors(self) -> float | None:
        """How many processors others used on average; None where the system does not say, which Linux does."""
        began, before, own = self._began
        now = all_seconds()
        elapsed = time.monotonic() - began
        if before is None or now is None or elapsed <= 0:
            return None
        others = (now - before - (own_seconds() - own)) / elapsed
        return min(max(0.0, others), float(os.cpu_count() or 1))


def is_busy(processors: float | None) -> bool:
    """Whether others used so much that times cannot be compared; False where that is not known.

    Args:
        processors: what ``OtherLoad.processors`` returned.

    Example:
        >>> is_busy(0.0), is_busy(1.5), is_busy(None)
        (False, True, False)
    """
    return processors is not None and processors > _BUSY_ABOVE


def describe(processors: float | None) -> str:
    """Whether the machine was busy, in words.

    Args:
        processors: what ``OtherLoad.processors`` returned.

    Example:
        >>> describe(0.0).split(":")[0], describe(1.5).split(":")[0], describe(None)
        ('quiet', 'busy', 'not known whether it was busy')
    """
    if processors is None:
        return "not known whether it was busy"
    state = "busy" if is_busy(processors) else "quiet"
    advice = "; measure again when it is quiet" if state == "busy" else ""
    return f"{state}: other processes used {processors:.1f} of {os.cpu_count()} processors{advice}"


def all_seconds() -> float | None:
    """Seconds in which the processors worked for anybody."""
    try:
        fields = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1 : 1 + _COUNTED]]
    except (OSError, ValueError):
        return None
    return sum(value for k, value in enumerate(fields) if k not in _IDLE) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Seconds in which they worked for this process, all threads."""
    return time.process_time()
