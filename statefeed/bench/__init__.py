"""Entry point of ``statefeed bench``: runs a benchmark and writes its records, table and figure."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from statefeed.bench.forward_options import ForwardOptions
from statefeed.bench.long_memory_options import AddingOptions, DigitsOptions, LongMemoryOptions, RecallOptions
from statefeed.bench.options import LayerOptions, MemoryOptions, OptionError, Options, ScanOptions, TrainingOptions
from statefeed.bench.records import written
from statefeed.bench.tracking_options import TrackingOptions

__all__ = ["OptionError", "main"]

# The options of each benchmark. It is the module of its name; long_memory runs all tasks of long memory. The module
# imports torch, the options do not.
_BENCHMARKS: dict[str, type[Options]] = {
    "layers": LayerOptions,
    "scan": ScanOptions,
    "memory": MemoryOptions,
    "training": TrainingOptions,
    "recall": RecallOptions,
    "adding": AddingOptions,
    "digits": DigitsOptions,
    "tracking": TrackingOptions,
    "forward": ForwardOptions,
}
_NEEDS = ("jsonargparse", "rich", "matplotlib", "numpy", "safetensors", "tokenizers", "yaml")
_PLACE = (
    "cell",
    "implementation",
    "variant",
    "layer",
    "method",
    "diagonal",
    "T",
    "B",
    "H",
    "S",
    "dtype",
    "pass",
    "seed",
)
_WIDEST = 1000  # characters, which no table has


def main(argv: Sequence[str], set_up_process: Callable[[], None] | None = None) -> int:
    """Run one benchmark: measure, write every record immediately, print a table and draw a figure.

    Args:
        argv: arguments after ``statefeed bench``: layers, scan, memory, training, recall, adding, digits, tracking or
            forward, and its flags.
        set_up_process: called before ``training``, which runs with the process settings of the trainer, baselines
            included. The others run in a process as users of the library have it: torch.nn as shipped, default
            denormals and allocator.

    Returns:
        Exit code: 0; 1 if parity fails and nothing was timed; 2 for invalid flags, a missing dependency or a full disk;
        130 if interrupted by Ctrl-C.
    """
    try:
        _require_application()
        name, options = _parse(argv)
        if name == "training" and set_up_process is not None:
            set_up_process()
        return _measure(name, options, argv)
    except OptionError as error:
        print(f"statefeed bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"statefeed bench: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("statefeed bench: interrupted: the records printed so far are saved", file=sys.stderr)
        return 130


def _measure(name: str, options: Options, argv: Sequence[str]) -> int:
    import torch
    from rich.console import Console
    from rich.measure import Measurement

    from statefeed.bench.measure import ParityError, environment, machine_line
    from statefeed.busy import describe

    module = "long_memory" if isinstance(options, LongMemoryOptions) else name
    bench = importlib.import_module(f"{__name__}.{module}")
    output, threads = Path(options.output), torch.get_num_threads()
    records: list[dict[str, Any]] = []
    torch.set_num_threads(options.threads or threads)
    try:
        metadata = environment(argv, options.device)
        if output.exists():
            print(f"{name}: the first record replaces those in {output}", file=sys.stderr)
        for record in written(({**record, **metadata} for record in bench.run(options)), output):
            records.append(record)
            print(f"{name}: {' '.join(str(record[key]) for key in _PLACE if key in record)}", file=sys.stderr)
    except ParityError as error:
        print(f"statefeed bench: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    console, table = Console(), bench.table(records)
    # A row that a narrow terminal wraps can be read, one that is truncated cannot.
    whole = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    if console.is_terminal and whole > console.width and hasattr(bench, "narrow_table"):
        table = bench.narrow_table(records)
    else:
        console.width = max(console.width, whole)
    console.print(machine_line(records))
    loads = [record["other_load"] for record in records if record.get("other_load") is not None]
    if loads:
        console.print(describe(max(loads)))
    console.print(table)
    picture = output.with_suffix(".png")
    bench.figure(records).savefig(picture, dpi=100)
    console.print(f"records in {output}, figure in {picture}")
    return 0


def _require_application() -> None:
    for package in _NEEDS:
        if importlib.util.find_spec(package) is None:
            raise OptionError(f'the benchmarks need {package}, which is not installed: pip install "statefeed[lm]"')


def _flag(field: str) -> str:
    """The flag of a field, whose name has an underscore where it would be a word of Python.

    Example:
        >>> _flag("pass_"), _flag("cells")
        ('pass', 'cells')
    """
    return field.rstrip("_")


def _did_you_mean(argv: Sequence[str]) -> str:
    """A hint where the benchmark, or one of its flags, is misspelt; else an empty string.

    Example:
        >>> _did_you_mean(["layer"]), _did_you_mean(["layers", "--cell=gru"]), _did_you_mean(["layers", "--zoom=1"])
        (': did you mean layers?', ': did you mean --cells?', '')
    """
    if argv and argv[0] not in _BENCHMARKS:
        words, known = list(argv[:1]), list(_BENCHMARKS)
    else:
        known = [f"--{_flag(item.name)}" for item in dataclasses.fields(_BENCHMARKS[argv[0]])] if argv else []
        words = [word.partition("=")[0] for word in argv[1:] if word.startswith("--")]
    unknown = [word for word in words if word not in [*known, "--help"]]
    near = difflib.get_close_matches(unknown[0], known, n=1) if unknown else []
    return f": did you mean {near[0]}?" if near else ""


def _parse(argv: Sequence[str]) -> tuple[str, Options]:
    """The benchmark's name and its checked options."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog="statefeed bench", exit_on_error=False, allow_abbrev=False)
    benchmarks = parser.add_subcommands(required=True, dest="benchmark")
    for name, kind in _BENCHMARKS.items():
        flags = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=kind.__doc__)
        hints = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            how = {"action": "store_true"} if hints[item.name] is bool else {"type": hints[item.name]}
            flags.add_argument(f"--{_flag(item.name)}", default=item.default, help=item.metadata["help"], **how)
        benchmarks.add_subcommand(name, flags, help=kind.__doc__)
    try:
        parsed = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise OptionError(" ".join(str(error).split()) + _did_you_mean(argv)) from None
    name = parsed.benchmark
    kind, values = _BENCHMARKS[name], parsed[name]
    return name, kind(**{item.name: values[_flag(item.name)] for item in dataclasses.fields(kind)})
