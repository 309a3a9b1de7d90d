"""The lock on a run: one process trains it at a time."""

from pathlib import Path
from typing import IO

from statefeed.lm.errors import UsageError


def lock(file: IO[str], folder: Path) -> None:
    """Lock the metrics of a run for as long as the file is open.

    Raises:
        UsageError: when another process holds the lock.
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
