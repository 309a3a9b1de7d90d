"""File lock on a run folder: one process at a time trains a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from statefeed.lm.errors import UsageError
from statefeed.lm.run.files import METRICS


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Context manager that locks a run; must be entered before files of the run are read to resume it, or written.

    The lock is on the metrics file, which is created if missing, because NFS does not lock folders.

    Args:
        folder: the run folder, which must exist.

    Raises:
        UsageError: another process holds the lock.
    """
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        _lock(file, folder)
        yield


def _lock(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{folder} is being trained by another process: wait for its end, or choose another folder with --run.dir"
        ) from None
    except OSError:  # the file system does not support locks
        return
