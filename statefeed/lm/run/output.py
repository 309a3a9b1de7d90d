"""What long work prints: lines as they are, and no error where nobody reads them any more."""

import os
import sys
from typing import Any

from rich.console import Console

from statefeed.lm.errors import notify


class _Output:
    """Standard output for work that must not end with its reader: a pager that quits, `head`, a full disk.

    The first error is reported on stderr, and what follows goes nowhere. It is standard output as of each call.
    """

    def __init__(self) -> None:
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        if not self._closed:
            try:
                # Not those of the locale, in which the text of a model may not be written.
                encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
                sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError, AttributeError) as error:  # AttributeError where there is no stdout
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
        try:  # what Python has not flushed yet would fail again when it ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        except (OSError, ValueError, AttributeError):
            pass
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is closed"
        notify(f"standard output cannot be written any more ({why}): the work continues without it")


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


def console(**options: Any) -> Console:
    """A console that prints text as it is: no markup, no emoji codes, no highlights.

    Args:
        options: further ones of rich's Console.
    """
    return Console(file=_Output(), markup=False, emoji=False, highlight=False, **options)  # type: ignore[arg-type]
