"""Records of benchmarks as tables and bars."""

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from statefeed.lm.compare.elements import figure_grid, note, table
from statefeed.lm.compare.measurements import kind
from statefeed.lm.compare.panel import SIZE
from statefeed.lm.compare.sources import MAIN
from statefeed.lm.compare.table import format_value

_MORE = "Medians, with minimum and maximum in parentheses; kernels, parity and limits are in the records."
_UNITS = {"tokens_per_s": "tokens per second", "ms": "milliseconds", "peak_bytes": "bytes at the peak"}

# The provenance in every record of a benchmark, printed in a line below the table.
_PROVENANCE = ("command", "commit", "dirty", "machine", "threads", "denormals", "versions", "date")
# What else only the records have: a table of everything would be wider than a screen.
_LEFT_OUT = {
    *_PROVENANCE,
    *("kernels", "parity", "matmul", "torch_nn_best", "limit_ms", "part_of_limit", "backward_us_per_step", "curve"),
    *("other_load", "rows", "I", "counted", "outputs_bytes", "tokens", "vocabulary", "steps", "repeats"),
}


def section(records: Sequence[dict[str, Any]]) -> str:
    """A table of what differs between the records, what they share in one line, and bars of the main number."""
    rows = [
        _flat({"machine": _machine(record), **{key: value for key, value in record.items() if key not in _LEFT_OUT}})
        for record in records
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shared = {key for key in keys if len(rows) > 1 and len({row.get(key) for row in rows}) == 1}
    headings = [key for key in keys if key not in shared]
    body = table([key.replace("_", " ") for key in headings], [[row.get(key, "-") for key in headings] for row in rows])
    shared_values = ", ".join(f"{key} {rows[0][key]}" for key in keys if key in shared and key != "bench")
    for command in dict.fromkeys(record.get("command") for record in records):
        first = next(record for record in records if record.get("command") == command)
        machine = first.get("machine") or {}
        body += note(
            f"{command}; {machine.get('gpu') or machine.get('cpu')}, {first.get('threads')} threads, "
            f"torch {(first.get('versions') or {}).get('torch')}, commit {str(first.get('commit'))[:10]}"
            f"{' and changes' if first.get('dirty') else ''}, {first.get('date')}"
        )
    return (
        body + note(f"{_MORE} In all rows: {shared_values}." if shared_values else _MORE) + figure_grid(_bars(records))
    )


def _machine(record: dict[str, Any]) -> str:
    found, threads = record.get("machine") or {}, record.get("threads")
    return f"{found.get('gpu') or found.get('cpu')}, {threads} thread{'s' if threads != 1 else ''}"


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """A record's numbers by name: a median with its minimum and maximum in one cell, other groups one cell each."""
    if isinstance(value, dict) and {"median", "min", "max"} <= value.keys():
        number = format_value(value["median"])
        if value["min"] != value["max"]:
            number += f" ({format_value(value['min'])} to {format_value(value['max'])})"
        return {name: number}
    if isinstance(value, dict):
        return {
            key: cell
            for part, inner in value.items()
            for key, cell in _flat(inner, f"{name}: {part}".removeprefix(": ")).items()
        }
    return {name: format_value(value)}


def _bars(records: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Bars of the main number of a benchmark, medians with their minima and maxima, one figure per case."""
    main = next((key for key in MAIN if any(record.get(key) for record in records)), None)
    if main is None:
        return {}
    cases: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get(main):
            keys = ("cell", "T", "B", "H", "S", "diagonal", "dtype")
            words = [*(str(record[key]) for key in keys if key in record), kind(record)]
            cases.setdefault(f"{' '.join(words).rstrip()}; {_machine(record)}".removeprefix("; "), []).append(record)
    drawn = {}
    for case, rows in cases.items():
        names = [" ".join(str(r[key]) for key in ("implementation", "variant", "method") if key in r) for r in rows]
        middle = [r[main]["median"] for r in rows]
        reach = [[r[main]["median"] - r[main]["min"] for r in rows], [r[main]["max"] - r[main]["median"] for r in rows]]
        figure = Figure(figsize=(SIZE[0], 1 + 0.28 * len(rows)), layout="constrained")
        axes = figure.add_subplot(xlabel=_UNITS[main])
        axes.barh(range(len(rows)), middle, xerr=reach, color="C0")
        figure.suptitle("\n".join(textwrap.wrap(f"{case}; medians, bars: minimum to maximum", 78)), fontsize=6.5)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        drawn[case] = figure
    return drawn
