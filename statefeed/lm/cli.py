"""Command line of the language-model application; every user error is one sentence and exit code 2."""

import ctypes
import dataclasses
import os
import platform
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from statefeed.lm import recipe as recipes
from statefeed.lm.compare import compare, report
from statefeed.lm.config import Data
from statefeed.lm.data import batches, cache, corpora
from statefeed.lm.errors import Diverged, Interrupted, PeerLost, UsageError, notify, require
from statefeed.lm.run import folder as run_folder
from statefeed.lm.run.device import resolve_device
from statefeed.lm.run.evaluate import score
from statefeed.lm.run.files import CONFIG
from statefeed.lm.run.generate import generate
from statefeed.lm.run.train import train

USAGE = """usage: statefeed COMMAND ...

  statefeed train [RECIPE.yaml] [--section.key=value ...]     train a language model, leave a run folder
  statefeed train [RECIPE.yaml|RUN] --resume [...]            resume the run in run.dir, or in the folder RUN
  statefeed evaluate RUN [--split=test]                       score a run on a split
  statefeed generate RUN [--prompt=TEXT] [--tokens=N]         sample from a run
  statefeed compare [RECIPE.yaml] --feedback=A,B [...]        train under several feedback rules, compare them
  statefeed report RUN_OR_RESULTS... [-o report.html]         one page of runs, comparisons and benchmarks
  statefeed corpora [RECIPE.yaml] [--data.key=value ...]      list the corpora, or what is in the one named
  statefeed bench layers|scan|memory|training|recall [--smoke]  time layers and training here, or test long memory

statefeed COMMAND --help lists every flag of a command.
"""


_python_showwarning = warnings.showwarning
_PACKAGE = Path(__file__).parent.parent
shown_warnings: set[str] = set()  # of this process


def main(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: the words after `statefeed`.

    Returns:
        The exit code: 0; 1 if training diverged or another process of the job ended; 2 for a user error, or if disk or
        memory are full; 128 plus the number of the signal if interrupted (130 for Ctrl-C), also by SIGPIPE if the
        reader of the output has closed it.
    """
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "generate": _generate,
        "compare": compare.command,
        "report": report.command,
        "corpora": _corpora,
    }
    try:
        for word in arguments:
            _check_utf8(word)
        if arguments and arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
        elif not arguments or arguments[0] not in commands:
            raise UsageError(
                f"expected a command ({', '.join(commands)}, bench), got {' '.join(arguments[:1]) or 'none'}"
            )
        else:
            commands[arguments[0]](arguments[1:])
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


def configure_process() -> None:
    """Configure this process for training; called by the command line only, since it affects the whole process.

    Denormals are flushed to zero: weights that decay to denormals slow down every product. Under glibc, large blocks
    stay in the heap: by default every large temporary is mapped and unmapped, with a page fault for every page.
    """
    torch.set_flush_denormal(True)
    warnings.showwarning = show_warning
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def show_warning(message: Warning | str, category: type[Warning], filename: str, *place: Any, **more: Any) -> None:
    """Print a warning of the library as one line, once, without its source line; others as Python does."""
    if category is not RuntimeWarning and not Path(filename).is_relative_to(_PACKAGE):
        _python_showwarning(message, category, filename, *place, **more)
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


def _train(arguments: Sequence[str]) -> None:
    flags = recipes.parser("statefeed train")
    flags.add_argument(
        "recipe", nargs="?", help="YAML file of these keys; flags override it; with --resume it may be a run folder"
    )
    flags.add_argument("--resume", action="store_true", help="resume the run in run.dir, bit for bit")
    flags.add_argument("--print_config", action="store_true", help="print the whole recipe as it would run, and stop")
    values = recipes.parse(flags, arguments)
    path = None if values.recipe is None else recipes.expand(values.recipe)
    if values.resume and (path is None or path.is_dir()):
        folder = path or recipes.expand(values.run.dir)
        if not (folder / CONFIG).is_file():
            raise UsageError(f"{folder} holds no run to resume: name its folder, or the recipe to begin with")
        named = [word for word in arguments if re.match(r"--run\.dir\b", word)]
        if path is not None and named and recipes.expand(values.run.dir).resolve() != path.resolve():
            raise UsageError(
                f"--resume {path} names the folder of the run, and --run.dir another, {values.run.dir}: give one"
            )
        # The folder may have been moved since.
        values = recipes.parse(flags, [*arguments, f"--run.dir={folder}"], folder / CONFIG)
    elif path is not None:
        if values.resume and not path.exists():
            raise UsageError(f"there is no run folder or recipe {path} to resume")
        if (path / CONFIG).is_file():
            raise UsageError(f"{path} is the folder of a run: resume it with --resume")
        values = recipes.parse(flags, arguments, path)
    config = recipes.build(values)
    if values.print_config:
        print(config.to_yaml(getattr(sys.stdout, "encoding", None) or "utf-8"), end="")
    else:
        train(config, values.resume)


def _run_parser(command: str) -> ArgumentParser:
    flags = ArgumentParser(prog=f"statefeed {command}", exit_on_error=False, allow_abbrev=False)
    flags.add_argument("run", help="run folder that `statefeed train` left")
    flags.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where it runs")
    return flags


def _evaluate(arguments: Sequence[str]) -> None:
    flags = _run_parser("evaluate")
    splits = Literal["train", "valid", "test", "all"]
    flags.add_argument("--split", type=splits, default="valid", help="what to score; all: the splits as one text")
    flags.add_argument(
        "--data.path",
        type=str | None,
        default=None,
        help="where the text of the run is now, or another text to score; null for where it was in training",
    )
    values = recipes.parse(flags, arguments)
    device = resolve_device(values.device, "--device")
    run = run_folder.load(recipes.expand(values.run))
    corpus = corpora.read(_data(run.config.data, values.data.path))
    if values.split not in ("all", *corpus.splits):
        raise UsageError(f"{corpus.name} has no {values.split} split, only {' and '.join(corpus.splits)}")
    chosen = [split for split in corpus.splits if values.split in (split, "all")]
    what = values.split
    for split in chosen:
        recorded = run.metadata["splits"].get(split, {}).get("sha256")
        if recorded in (None, corpus.digests[split]):
            continue
        if values.data.path is None:
            raise UsageError(
                f"the {split} split of {corpus.name} is not the text of the run: expected sha256 {recorded}, got "
                f"{corpus.digests[split]}; name the text to score with --data.path"
            )
        what = f"{values.split} of {corpus.name}, another text than the run's"
    ids = cache.encode(run.tokenizer, "".join(corpus.splits[split] for split in chosen))
    source = batches.scoring(ids, run.config.data, run.config.train)
    print(f"{what}: {score(run.model.to(device), source, sum(corpus.sizes[split] for split in chosen))}")


def _data(data: Data, path: str | None) -> Data:
    """The data section of a run, with another path if one is given."""
    if path is None:
        return data
    corpus = "text" if data.corpus == "pydoc" else data.corpus
    return dataclasses.replace(data, corpus=corpus, path=path)


def _generate(arguments: Sequence[str]) -> None:
    flags = _run_parser("generate")
    flags.add_argument("--prompt", type=str, default="\n", help="text to continue")
    flags.add_argument("--tokens", type=int, default=200, help="how many tokens to add")
    flags.add_argument("--temperature", type=float, default=1.0, help="lower: more deterministic; higher: more diverse")
    flags.add_argument("--top-k", type=int | None, default=None, help="sample from the k likeliest tokens only")
    flags.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability"
    )
    flags.add_argument("--seed", type=int, default=1, help="the same seed gives the same text")
    values = recipes.parse(flags, arguments)
    require(values.tokens >= 1, "--tokens must be at least 1", values.tokens)
    require(0 < values.temperature < float("inf"), "--temperature must be positive", values.temperature)
    require(values.top_k is None or values.top_k >= 1, "--top-k must be at least 1", values.top_k)
    require(0 < values.top_p <= 1, "--top-p must be above 0 and at most 1", values.top_p)
    require(0 <= values.seed < 2**63, "--seed must be at least 0 and below 2^63", values.seed)
    device = resolve_device(values.device, "--device")
    run = run_folder.load(recipes.expand(values.run))
    outside = run.tokenizer.unknown(values.prompt)
    if outside is not None:
        kind = run.config.data.tokens
        raise UsageError(f"--prompt: {outside!r} is not among the {run.tokenizer.size:,} {kind} tokens of {values.run}")
    ids = [int(i) for i in run.tokenizer.encode(values.prompt)]
    require(bool(ids), "--prompt must hold at least one token", repr(values.prompt))
    following = generate(
        run.model.to(device),
        ids,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
        sentence=run.tokenizer.sentence,
    )
    ids += [next(following) for _ in range(values.tokens)]
    print(run.tokenizer.decode(ids))


def _corpora(arguments: Sequence[str]) -> None:
    if not arguments:
        for name, what in corpora.KINDS.items():
            print(textwrap.fill(what, 100, initial_indent=f"{name:10}", subsequent_indent=10 * " "))
        print("\nFiles may be plain, .gz or .xz. `statefeed corpora --data.corpus=ptb --data.path=FOLDER` reads one.")
        return
    flags = recipes.parser("statefeed corpora")
    flags.add_argument("recipe", nargs="?", help="YAML file of these keys, of which data counts; flags override it")
    values = recipes.parse(flags, arguments)
    values = recipes.parse(flags, arguments, values.recipe)
    data = recipes.build(values).data
    corpus = corpora.read(data)
    tokenizer = cache.tokenizer(data, corpus.splits)
    print(f"{corpus.name}: {tokenizer.size:,} types of {data.tokens} tokens")
    print(f"{'split':5}  {'bytes':>13}  {'tokens':>13}  sha256")
    for split, text in corpus.splits.items():
        amounts = f"{corpus.sizes[split]:13,}  {len(cache.encode(tokenizer, text)):13,}"
        print(f"{split:5}  {amounts}  {corpus.digests[split]}")
