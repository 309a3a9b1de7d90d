"""Standard output of a long run, which does not fail if its reader closes it."""

import os
import sys
from typing import Any

from rich.console import Console

from statefeed.lm.errors import notify


class _Output:
    """Standard output that ignores write errors: a pager that quits, `head`, a full disk.

    The first error is reported on stderr, and later output is discarded. `sys.stdout` is looked up at every call.
    """

    def __init__(self) -> None:
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        if not self._closed:
            try:
                # Replace characters that the encoding of stdout lacks: a model may generate any text.
                encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
                sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError, AttributeError) as error:  # AttributeError: there is no stdout
                self._close(error)
        return len(text)

    def flush(self) -> None:
        if not self._closed:
            try:
                sys.stdout.flush()
            except (OSError, ValueError, AttributeError) as error:
                self._close(error)

    def _close(self, error: Exception) -> None:
        self._closed = True
        try:  # Python flushes its buffer at exit, which would fail again
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        except (OSError, ValueError, AttributeError):
            pass
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is closed"
        notify(f"standard output cannot be written any more ({why}): the work continues without it")


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


def console(**options: Any) -> Console:
    """A rich console that prints text unchanged: no markup, no emoji codes, no highlights.

    Args:
        options: further options of rich's Console.
    """
    return Console(file=_Output(), markup=False, emoji=False, highlight=False, **options)  # type: ignore[arg-type]
