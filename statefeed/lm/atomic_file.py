"""Atomic writes: after a failure or a power loss a file has either its old or its new content."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacement(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Context manager with the path of a temporary file, which replaces another file if the block succeeds.

    Its content is flushed to disk before it is renamed, and the rename after that.

    Args:
        path: path of the file to replace or create.
        folder: folder of the temporary file, in the same file system; by default that of the file.
    """
    unfinished = (folder or path.parent) / f"{path.name}.unfinished"
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of writing, such as a full disk, has no name
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str, folder: Path | None = None) -> None:
    """Write a text file in UTF-8 atomically; arguments as for ``replacement``."""
    with replacement(path, folder) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_output(path: Path, text: str) -> None:
    """Write a text file that the user has named: atomically, except to a device or a pipe, and through links."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path.resolve(), text)
