"""The cache folder of a user: where it is, and whether what is in it may be used."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """``statefeed`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it may not exist.

    Raises:
        OSError: this user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statefeed"
    except RuntimeError:
        raise OSError("this user has no home folder for a cache: set XDG_CACHE_HOME to a folder") from None


def make_private(folder: Path) -> None:
    """Make the cache folder, which only this user may enter; one that others could write to is closed to them.

    Raises:
        OSError: it cannot be made, it is not this user's, or others could put another one in its place.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "geteuid") and folder.stat().st_uid == os.geteuid() and folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    parent = folder.parent.resolve()
    mode = parent.stat().st_mode
    if hasattr(os, "geteuid") and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        # Others could put another folder in its place, after it was checked and before a library is loaded.
        reason: str | None = f"{parent} may be written by others (mode {stat.S_IMODE(mode):o})"
    else:
        reason = distrust(folder)
    if reason is not None:
        raise OSError(f"{reason}: set XDG_CACHE_HOME to a folder of your own")


def distrust(path: Path) -> str | None:
    """Why a file or folder that exists must not be used, None if it may.

    It may where it belongs to this user or root and nobody else may write to it. A symbolic link must, too.

    Args:
        path: of the file or folder.
    """
    if not hasattr(os, "geteuid"):  # Windows, whose profile folders are private
        return None
    for found in (path.lstat(), path.stat()):
        if found.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to user {found.st_uid}, expected {os.geteuid()} or root"
        if not stat.S_ISLNK(found.st_mode) and found.st_mode & 0o022:
            return f"{path} may be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None
