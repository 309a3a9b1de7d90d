"""Errors of the language-model application; the command line turns each into one sentence and an exit code."""

import sys
from contextlib import suppress


class UsageError(ValueError):
    """A user error, described in one sentence; the command line exits with code 2.

    Args:
        sentence: what is wrong, what is expected and what was passed.
        reported: whether another process has already printed the sentence.
    """

    def __init__(self, sentence: str, *, reported: bool = False) -> None:
        super().__init__(sentence)
        self.reported = reported


class CorruptFile(UsageError):
    """A file of tensors is corrupt."""


class Diverged(RuntimeError):
    """Training diverged: the loss or the weights are no longer finite."""


class PeerLost(RuntimeError):
    """Another process of the job has ended."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the command.

    Args:
        sentence: what is saved and how to resume.
        number: the number of the signal.
    """

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.number = number


def notify(sentence: str) -> None:
    """Print a notice on stderr; errors of printing, such as a closed stderr, are ignored."""
    with suppress(OSError, ValueError):
        print(f"statefeed: {sentence}", file=sys.stderr, flush=True)


def require(condition: bool, expectation: str, got: object) -> None:
    """Raise unless a value is acceptable.

    Args:
        condition: whether the value is acceptable.
        expectation: what is expected, as the beginning of a sentence.
        got: the value.

    Raises:
        UsageError: the condition is false.

    >>> require(1 > 2, "train.batch must be at least 1", 0)
    Traceback (most recent call last):
    statefeed.lm.errors.UsageError: train.batch must be at least 1, got 0
    """
    if not condition:
        raise UsageError(f"{expectation}, got {got}")
