"""Owns how a training ends early: by a signal, a loss that is none, a full disk; one sentence, and what is kept."""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from statefeed.lm.config import UsageError


class Diverged(RuntimeError):
    """The loss is no longer a number that has a perplexity."""


class Lost(RuntimeError):
    """Another process of the job is gone."""


class Refused(RuntimeError):
    """A process that trains for this one has told a mistake of the user's in its own words, after which none follow."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the training after a checkpoint.

    Args:
        sentence: what is kept and how to go on.
        number: of the signal.
    """

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.number = number


class Signals:
    """SIGINT and SIGTERM while this context is entered: they end what is going on, a step only when it is finished.

    What is raised is KeyboardInterrupt, or Interrupted for SIGTERM. Inside `held` they are noted, so that the step in
    hand can be finished and saved; a second SIGINT ends it at once.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._held = False

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        else:
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Lost):
            return  # torchrun ends a job by SIGTERM, which must not cut off the last word
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note signals instead of raising; until the end of the process where another one of the job is lost."""
        self._held = True
        lost = False
        try:
            yield
        except Lost:
            lost = True
            raise
        finally:
            self._held = lost

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._held and number == signal.SIGTERM:
            raise Interrupted("interrupted", number)
        if not self._held or self.caught == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number


@contextmanager
def told(kept: Callable[[], str], again: str = "") -> Iterator[None]:
    """Say in one sentence why the work inside could not go on, what is kept of it, and how to go on with it.

    Args:
        kept: the second part of the sentence.
        again: the third, left out where the same would happen again.

    Raises:
        UsageError: in place of an error of the system, such as a full disk, of memory that cannot be had, and of blocks
            that torch.compile cannot compile.
        Diverged, Lost, KeyboardInterrupt: with the other parts added.
    """
    try:
        yield
    except Interrupted as error:
        raise Interrupted(f"{error}: {kept()}{again}", error.number) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {kept()}{again}") from None
    except Diverged as error:
        raise Diverged(f"{error}; {kept()}") from None
    except Lost as error:
        raise Lost(f"{error}; {kept()}{again}") from error
    except OSError as error:
        sentence = f"{error.filename or 'the system'}: {error.strerror or error}; {kept()}{again}"
        raise UsageError(sentence) from error
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            why = " ".join(str(error).partition("\n\n")[0].split())
            sentence = f"torch.compile failed ({why}): leave train.compile out; {kept()}"
            raise UsageError(sentence) from error
        if not _memory(error):
            raise
        advice = "lower train.batch or train.context, or raise train.accumulate"
        raise UsageError(f"out of memory: {advice}; {kept()}{again}") from error


def _memory(error: Exception) -> bool:
    """Whether memory is what was missing: torch says so in several ways, most of them a plain RuntimeError."""
    return isinstance(error, MemoryError) or bool(
        re.search(
            r"out of memory|can't allocate memory|not enough memory|bad_alloc|could not create a memory", str(error)
        )
    )
