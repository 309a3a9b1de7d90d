"""Handler of SIGINT, SIGTERM and SIGHUP during a run: raise at once, or after the step is finished and saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from statefeed.lm.errors import Interrupted, PeerLost


def handled() -> list[int]:
    """The numbers of the signals to handle."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    more = [] if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else [hangup]
    return [signal.SIGINT, signal.SIGTERM, *more]


class SignalHandler:
    """Context manager that handles SIGINT, SIGTERM and SIGHUP.

    SIGINT raises KeyboardInterrupt, the others its subclass Interrupted. A process that ignores SIGHUP, as under nohup,
    continues to ignore it. Inside `deferred`, a signal is stored in `caught` instead, so that the current step can be
    finished and saved; a second SIGINT raises at once.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._deferred = False

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
            self._before = {number: signal.signal(number, self._handle) for number in handled()}
        else:
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, PeerLost):
            return  # torchrun ends the job with SIGTERM, which must not interrupt the error message
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager that stores signals instead of raising; after PeerLost, until the process ends."""
        self._deferred = True
        lost = False
        try:
            yield
        except PeerLost:
            lost = True
            raise
        finally:
            self._deferred = lost

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred and number != signal.SIGINT:
            raise Interrupted("interrupted", number)
        if not self._deferred or self.caught == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number
