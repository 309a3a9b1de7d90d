"""Command line of the language-model application; every user error is one sentence and exit code 2."""

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
  statefeed bench NAME [--smoke]                              layers, scan, memory, training, recall, adding, digits,
                                                              tracking, forward

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


_python_showwarning = warnings.showwarning
shown_warnings: set[str] = set()  # of this process


def main(arguments: Sequence[str], set_up_process: Callable[[], None] | None = None) -> int:
    """Carry out one command.

    Args:
        arguments: the words after `statefeed`.
        set_up_process: called once the arguments are found right, before the work that they describe.

    Returns:
        The exit code: 0; 1 if training diverged or another process of the job ended; 2 for a user error, or if disk or
        memory are full; 128 plus the number of the signal if interrupted (130 for Ctrl-C), also by SIGPIPE if the
        reader of the output has closed it.
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
    except BrokenPipeError:  # the reader has closed the pipe, as in `statefeed corpora | head`: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _report(f"{error.filename or 'the system'}: {error.strerror or error}", 2)
    except Diverged as error:
        return _report(str(error), 1)
    except PeerLost as error:
        notify(str(error))  # in every remaining process
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


def configure_process() -> None:
    """Configure this process for training; called by the command line only, since it affects the whole process.

    Denormals are flushed to zero: weights that decay to denormals slow down every product. Under glibc, large blocks
    stay in the heap: by default every large temporary is mapped and unmapped, with a page fault for every page.
    """
    import torch  # here, so that help and errors in the arguments are answered without it

    torch.set_flush_denormal(True)
    warnings.showwarning = show_warning
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print a warning of the library as one line, once, without its source line; others as Python does."""
    if category is not RuntimeWarning and not hasattr(message, "of_statefeed"):
        _python_showwarning(message, category, *place, **more)
    elif (sentence := " ".join(str(message).split())) not in shown_warnings:
        shown_warnings.add(sentence)
        notify(sentence)


def _report(sentence: str, code: int) -> int:
    """Print an error in the process of rank 0 only, since all processes of a job fail together."""
    if os.environ.get("RANK", "0") == "0":
        notify(sentence)
    return code


def _check_utf8(word: str) -> None:
    """Raise if an argument is not UTF-8 text, which a recipe could not store."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        byte = ord(word[error.start]) & 0xFF
        raise UsageError(
            f"arguments must be UTF-8 text, got byte 0x{byte:02x} at offset {error.start} of {word!a}"
        ) from None
