"""Error messages of a training that ends early: the reason, what is saved, and how to resume."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from statefeed.lm.errors import Diverged, Interrupted, PeerLost, UsageError


@contextmanager
def describe_failure(saved: Callable[[], str], remedy: Callable[[], str] = str) -> Iterator[None]:
    """Context manager that completes error messages with what is saved and how to resume.

    Args:
        saved: returns what is saved.
        remedy: returns how to resume; not used if the same error would occur again.

    Raises:
        UsageError: in place of a system error such as a full disk, of an out-of-memory error, and of an error of
            torch.compile.
        Diverged, PeerLost, KeyboardInterrupt: with a completed message.
    """
    try:
        yield
    except Interrupted as error:
        raise Interrupted(f"{error}: {saved()}{remedy()}", error.number) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {saved()}{remedy()}") from None
    except Diverged as error:
        raise Diverged(f"{error}; {saved()}") from None
    except PeerLost as error:
        raise PeerLost(f"{error}; {saved()}{remedy()}") from error
    except OSError as error:
        sentence = f"{error.filename or 'the system'}: {error.strerror or error}; {saved()}{remedy()}"
        raise UsageError(sentence) from error
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            why = " ".join(str(error).partition("\n\n")[0].split())
            sentence = f"torch.compile failed ({why}): leave train.compile out; {saved()}"
            raise UsageError(sentence) from error
        if not _out_of_memory(error):
            raise
        advice = "lower train.batch or train.context, or raise train.accumulate"
        raise UsageError(f"out of memory: {advice}; {saved()}{remedy()}") from error


def _out_of_memory(error: Exception) -> bool:
    """Whether an error means out of memory, which torch mostly raises as a plain RuntimeError."""
    return isinstance(error, MemoryError) or bool(
        re.search(
            r"out of memory|can't allocate memory|not enough memory|bad_alloc|could not create a memory", str(error)
        )
    )
