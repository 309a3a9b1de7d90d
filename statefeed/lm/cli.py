"""The command line: its commands by name; every user error is one sentence and exit code 2."""

import ctypes
import difflib
import os
import platform
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from statefeed.lm import commands
from statefeed.lm.compare import commands as compare
from statefeed.lm.errors import Diverged, Interrupted, PeerLost, UsageError, notify

USAGE = """usage: statefeed COMMAND ...

  statefeed train [RECIPE.yaml] [--section.key=value ...]     train a language model, leave a run folder
  statefeed train [RECIPE.yaml|RUN] --resume [...]            resume the run in run.dir, or in the folder RUN
  statefeed train [RECIPE.yaml] --again [...]                 resume it if it is unfinished, else start a numbered one
  statefeed evaluate RUN [--split=test]                       score a run on a split
  statefeed generate RUN [--prompt=TEXT] [--tokens=N]         sample from a run
  statefeed compare [RECIPE.yaml] --feedback=A,B [...]        train under several feedback rules, compare them
  statefeed report RUN_OR_RESULTS... [-o report.html]         one page of runs, comparisons and benchmarks
  statefeed corpora [RECIPE.yaml] [--data.key=value ...]      list the corpora, or what is in the one named
  statefeed recipes [NAME...]                                 list the recipes of the package, or copy those named
  statefeed bench layers|scan|memory|training|recall [--smoke]  time layers and training here, or test long memory

  statefeed --version

statefeed COMMAND --help lists every flag of a command.
"""

COMMANDS: dict[str, Callable[[Sequence[str]], commands.Work | None]] = {
    "train": commands.train,
    "evaluate": commands.evaluate,
    "generate": commands.generate,
    "compare": compare.compare,
    "report": compare.report,
    "corpora": commands.list_corpora,
    "recipes": commands.copy_recipes,
}


_PYTHONS_WARNING = warnings.showwarning


def main(arguments: Sequence[str], set_up_process: Callable[[], None] | None = None) -> int:
    """Carry out one command.

    Args:
        arguments: the words after `statefeed`.
        set_up_process: called once the arguments are found right, before the work that they describe.

    Returns:
        The exit code: 0; 1 when training diverged or another process of the job ended; 2 for a user error, a full
        disk or memory; 128 and the signal's number when interrupted, as 130 for Ctrl-C, or when the reader of its
        output has closed it.
    """
    try:
        for word in arguments:
            _check_utf8(word)
        if arguments and arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
        elif not arguments or arguments[0] not in COMMANDS:
            raise UsageError(_unknown(arguments[0] if arguments else None))
        elif (work := COMMANDS[arguments[0]](arguments[1:])) is not None:
            if set_up_process is not None:
                set_up_process()
            work()
        sys.stdout.flush()
    except UsageError as error:
        return 2 if error.reported else _report(str(error), 2)
    except BrokenPipeError:  # as in `statefeed corpora | head`: the reader has closed it, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes when it ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _report(f"{error.filename or 'the system'}: {error.strerror or error}", 2)
    except Diverged as error:
        return _report(str(error), 1)
    except PeerLost as error:
        notify(str(error))  # by every process that is left
        return 1
    except Interrupted as error:
        return _report(str(error), 128 + error.number)
    except KeyboardInterrupt as error:
        return _report(str(error) or "interrupted", 130)
    return 0


def _unknown(word: str | None) -> str:
    """What is wrong with a word that is no command, and the command that it may have meant."""
    known = [*COMMANDS, "bench"]
    near = difflib.get_close_matches(word or "", [*known, "--help", "--version"], n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    return f"expected a command ({', '.join(known)}), got {word or 'none'}{hint}"


def own_process() -> None:
    """Set this process up for training; for the command line alone, since it changes the whole process.

    Denormals become zero: weights that decay without ever being used would slow every product they enter. Under glibc
    large blocks stay in the heap: by default every large temporary is mapped and unmapped each time, with a
    fault for every page.
    """
    import torch  # here, so that help and errors in the arguments are answered without it

    torch.set_flush_denormal(True)
    warnings.showwarning = _show_warning
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """A warning of the library as one line, without the line of code it came from; others as Python prints them."""
    if category is RuntimeWarning:
        notify(" ".join(str(message).split()))
    else:
        _PYTHONS_WARNING(message, category, *place, **more)


def _report(sentence: str, code: int) -> int:
    """Print why, once for all processes of a job, since what stops one stops all."""
    if os.environ.get("RANK", "0") == "0":
        notify(sentence)
    return code


def _check_utf8(word: str) -> None:
    """Raise unless an argument is text: other bytes can be neither saved in a recipe nor encoded."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        byte = ord(word[error.start]) & 0xFF
        raise UsageError(
            f"arguments must be UTF-8 text, got byte 0x{byte:02x} at offset {error.start} of {word!a}"
        ) from None
