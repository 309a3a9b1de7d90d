"""Entry point of ``statefeed bench``: runs a benchmark and writes its records, table and figure."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch

from statefeed.bench import forward, layers, memory, recall, scan, training
from statefeed.bench.measure import ParityError, environment
from statefeed.bench.options import OptionError, Options

__all__ = ["OptionError", "ParityError", "main"]

_BENCHMARKS = {
    "layers": layers,
    "scan": scan,
    "memory": memory,
    "training": training,
    "recall": recall,
    "forward": forward,
}
_NEEDS = ("jsonargparse", "rich", "matplotlib", "numpy", "safetensors", "tokenizers", "yaml")
_PLACE = ("cell", "implementation", "variant", "layer", "method", "diagonal", "T", "B", "H", "S", "dtype", "seed")
# Table width in characters if the output is not a terminal.
_WIDTH = 190


def main(argv: Sequence[str]) -> int:
    """Run one benchmark: measure, write every record immediately, print a table and draw a figure.

    Args:
        argv: arguments after ``statefeed bench``: layers, scan, memory, training, recall or forward, and its flags.

    Returns:
        Exit code: 0; 1 if parity fails and nothing was timed; 2 for invalid flags, a missing dependency or a full disk;
        130 if interrupted by Ctrl-C.
    """
    try:
        _require_application()
        name, options = _parse(argv)
        _measure(name, options, argv)
    except OptionError as error:
        print(f"statefeed bench: {error}", file=sys.stderr)
        return 2
    except ParityError as error:
        print(f"statefeed bench: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"statefeed bench: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("statefeed bench: interrupted: the records printed so far are saved", file=sys.stderr)
        return 130
    return 0


def _measure(name: str, options: Options, argv: Sequence[str]) -> None:
    from rich.console import Console

    bench: Any = _BENCHMARKS[name]
    output, threads = Path(options.output), torch.get_num_threads()
    records: list[dict[str, Any]] = []
    torch.set_num_threads(options.threads or threads)
    try:
        metadata = environment(argv, options.device)
        for record in bench.run(options):
            with output.open("a" if records else "w", encoding="utf-8") as lines:
                lines.write(json.dumps({**record, **metadata}) + "\n")
            records.append(record)
            print(f"{name}: {' '.join(str(record[key]) for key in _PLACE if key in record)}", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    machine, versions = metadata["machine"], metadata["versions"]
    console.print(f"{machine['gpu'] or machine['cpu']}, {metadata['threads']} threads, torch {versions['torch']}")
    console.print(bench.table(records))
    picture = output.with_suffix(".png")
    bench.figure(records).savefig(picture, dpi=100)
    console.print(f"records in {output}, figure in {picture}")


def _require_application() -> None:
    for package in _NEEDS:
        if importlib.util.find_spec(package) is None:
            raise OptionError(f'the benchmarks need {package}, which is not installed: pip install "statefeed[lm]"')


def _parse(argv: Sequence[str]) -> tuple[str, Options]:
    """The benchmark's name and its checked options."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog="statefeed bench", exit_on_error=False, allow_abbrev=False)
    benchmarks = parser.add_subcommands(required=True, dest="benchmark")
    for name, bench in _BENCHMARKS.items():
        flags = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=bench.Options.__doc__)
        hints = get_type_hints(bench.Options)
        for item in dataclasses.fields(bench.Options):
            kind = {"action": "store_true"} if hints[item.name] is bool else {"type": hints[item.name]}
            flags.add_argument(f"--{item.name}", default=item.default, help=item.metadata["help"], **kind)
        benchmarks.add_subcommand(name, flags, help=bench.Options.__doc__)
    try:
        parsed = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise OptionError(" ".join(str(error).split())) from None
    name = parsed.benchmark
    return name, _BENCHMARKS[name].Options(**vars(parsed[name]))
