"""The user's cache folder: its path, and checks that no other user can write into it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """The path ``statefeed`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, which may not exist.

    Raises:
        OSError: this user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statefeed"
    except RuntimeError:
        raise OSError("this user has no home folder for a cache: set XDG_CACHE_HOME to a folder") from None


def make_private(folder: Path) -> None:
    """Create the cache folder with access for this user only, and correct the mode of an existing folder.

    Raises:
        OSError: the folder cannot be created, belongs to another user, or could be replaced by another user.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the cache folder {folder} cannot be created ({error.strerror}): set XDG_CACHE_HOME to a folder that you "
            "can write"
        ) from error
    if hasattr(os, "geteuid") and folder.stat().st_uid == os.geteuid() and folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    parent = folder.parent.resolve()
    mode = parent.stat().st_mode
    if hasattr(os, "geteuid") and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        # Another user could replace the folder after the check and before a library is loaded.
        reason: str | None = f"{parent} can be written by others (mode {stat.S_IMODE(mode):o})"
    else:
        reason = distrust(folder)
    if reason is not None:
        raise OSError(f"{reason}: set XDG_CACHE_HOME to a folder of your own")


def distrust(path: Path) -> str | None:
    """Why an existing file or folder must not be used; None if it is safe.

    It is safe if it belongs to this user or root and no other user can write to it. A symbolic link must satisfy this
    too.

    Args:
        path: path of the file or folder.

    Returns:
        The reason in words.
    """
    if not hasattr(os, "geteuid"):  # on Windows, profile folders are private
        return None
    for found in (path.lstat(), path.stat()):
        if found.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to user {found.st_uid}, expected {os.geteuid()} or root"
        if not stat.S_ISLNK(found.st_mode) and found.st_mode & 0o022:
            return f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None
