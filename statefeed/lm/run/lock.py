"""The lock on a run: one process trains it at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from statefeed.lm.errors import UsageError
from statefeed.lm.run.files import METRICS


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a run, before anything in its folder is read to be continued or written.

    The lock is on the metrics, which are made, empty, where there are none: a file, since NFS locks no folders.

    Args:
        folder: the run folder, which exists.

    Raises:
        UsageError: when another process holds the lock.
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
    except OSError:  # a file system without locks
        return
