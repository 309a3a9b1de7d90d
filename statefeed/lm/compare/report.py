"""Owns `statefeed report`: runs, comparisons and benchmarks on one page of HTML that needs nothing from outside."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from matplotlib.figure import Figure

from statefeed.lm import config
from statefeed.lm.compare import figures, results
from statefeed.lm.compare.results import Result
from statefeed.lm.config import UsageError, require
from statefeed.lm.run import checkpoint
from statefeed.lm.run.schema import checked

COMPARISON = "compare.jsonl"

# The main number of a benchmark is the first of these that it has.
_MAIN = ("tokens_per_s", "ms", "peak_bytes")
_SPREAD = {"median": float, "min": float, "max": float}
_BENCHMARK = {
    "bench": str,
    "command": (str, None),
    "machine": ({}, None),
    "versions": ({}, None),
    **dict.fromkeys(_MAIN, (_SPREAD, None)),
}

# What stands in every record of a benchmark about its circumstances; told once in a line above the table.
_CIRCUMSTANCES = ("command", "commit", "dirty", "machine", "threads", "denormals", "versions", "date")

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
p { overflow-wrap: anywhere; } .note { color: #555; font-size: .85rem; }
nav ul { padding-left: 1.2rem; } a { color: #0550ae; }
.table { overflow-x: auto; border: 1px solid #ddd; border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { background: #f6f6f6; font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th:first-child { background: #f6f6f6; }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere;
  min-width: 7rem; } }
.figures { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; }
"""


@dataclass
class Found:
    """What the paths hold."""

    results: list[Result] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)


def read(paths: Iterable[Path]) -> Found:
    """Everything that run folders, comparison folders, other folders of these and JSONL files hold.

    Raises:
        UsageError: for a path that is missing or holds none of them, and for a file that cannot be read as one.
    """
    found = Found()
    for path in paths:
        before = len(found.results) + len(found.benchmarks)
        if path.is_dir():
            _folder(path, found)
        elif path.is_file():
            _file(path, found)
        else:
            raise UsageError(f"there is no file or folder {path}: expected runs, comparisons or JSONL records")
        if len(found.results) + len(found.benchmarks) == before:
            raise UsageError(f"{path} holds no run, no {COMPARISON} and no records of a benchmark")
    # A run may be found in its folder, in a comparison's records and in a copy of these.
    same = results.split(found.results, lambda result: f"{results.recipe(result)} {result.valid}")
    found.results = [group[0] for group in same.values()]
    return found


def _folder(folder: Path, found: Found) -> None:
    if (folder / checkpoint.METRICS).is_file():
        found.results.append(results.of_run(folder))
        return
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix == ".jsonl":
            _file(path, found)
        elif path.is_dir() and not (folder / COMPARISON).is_file():  # whose runs its records tell of
            _folder(path, found)


def _file(path: Path, found: Found) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: expected JSON objects, one a line") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = checked(json.loads(line), {})
            if "bench" in record:
                found.benchmarks.append(_benchmark_record(record))
            else:
                found.results.append(results.from_line(line))
        except ValueError as error:
            raise UsageError(
                f"line {number} of {path} is no record of a comparison or a benchmark, one JSON object a line: {error}"
            ) from None


def _benchmark_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a benchmark as its table and bars need it; ValueError where it is none."""
    checked(record, _BENCHMARK)
    for name in _MAIN:
        if (spread := record.get(name)) and not spread["min"] <= spread["median"] <= spread["max"]:
            raise ValueError(f"{name} must have its median between min and max, got {spread}")
    return record


def command(arguments: Sequence[str]) -> None:
    """Carry out `statefeed report`.

    Args:
        arguments: the words after it.

    Raises:
        UsageError: for a mistake in them, or a path that holds nothing to report.
    """
    flags = ArgumentParser(prog="statefeed report", exit_on_error=False, allow_abbrev=False)
    flags.add_argument(
        "paths",
        nargs="+",
        help="run folders, comparison folders, folders of these, JSONL files of a comparison or bench",
    )
    flags.add_argument("-o", "--output", type=str, default="report.html", help="the page, replaced if it is there")
    flags.add_argument("--figures", type=str, default=None, help="a folder for the figures as SVG files besides")
    values = config.parse(flags, arguments)
    output, folder = Path(values.output), None if values.figures is None else Path(values.figures)
    require(output.parent.is_dir(), "--output must lie in a folder that exists", output)
    require(folder is None or folder.is_dir() or not folder.exists(), "--figures must name a folder", folder)
    found = read([Path(path) for path in values.paths])
    write(found, output)
    told = [f"{output}: {len(found.results)} runs, {len(found.benchmarks)} records of benchmarks"]
    if folder is not None:
        told += figures.save(figures.draw(found.results), folder)
    print("\n".join(told))


# The page ------------------------------------------------------------------------------------------------------------


def write(found: Found, output: Path) -> None:
    """Write the page.

    Args:
        found: what it tells.
        output: where it goes; one that is there is replaced.
    """
    output.write_text(page(found), encoding="utf-8")


def page(found: Found) -> str:
    """The page as text: for every task a table of its rules and its figures, sizes and cells, then the benchmarks."""
    drawn = figures.draw(found.results)
    sections: list[tuple[str, str]] = []
    for title, same in results.tasks(found.results).items():
        mine = {name: drawn.pop(name) for name in list(drawn) if name.startswith(f"{title}: ")}
        body = _table(*results.table(same)) + _note(_about(same)) + _figures(mine, title)
        sections.append((title, body))
    if drawn:
        sections.append(("Over sizes and cells", _figures(drawn, "")))
    for name in dict.fromkeys(record["bench"] for record in found.benchmarks):
        records = [record for record in found.benchmarks if record["bench"] == name]
        sections.append((f"statefeed bench {name}", _benchmark(records)))
    contents = "".join(f'<li><a href="#s{k}">{html.escape(title)}</a></li>' for k, (title, _) in enumerate(sections))
    body = "".join(f'<section id="s{k}"><h2>{html.escape(t)}</h2>{b}</section>' for k, (t, b) in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>statefeed report</title><style>{_STYLE}</style></head><body>"
        f"<h1>statefeed report</h1><nav><ul>{contents}</ul></nav>{_unique(body)}</body></html>\n"
    )


def _about(same: Sequence[Result]) -> str:
    """Under which circumstances the runs of one task were made."""
    facts = [result.facts for result in same]

    def all_of(key: str) -> str:
        return " and ".join(dict.fromkeys(_number(fact[key]) for fact in facts if key in fact))

    return (
        f"{all_of('parameters')} parameters. Perplexity: mean and standard deviation over the seeds of the best "
        "evaluation. Epochs and seconds to: the first evaluation that reaches what the named rule ends with, seed by "
        "seed; seconds are those of training, evaluations left out. Times of runs that were made one after the other, "
        f"not in turns. torch {all_of('torch')}, {all_of('threads')} threads, {all_of('machine')}."
    )


def _benchmark(records: Sequence[dict[str, Any]]) -> str:
    """A table of what differs between the records, what they share in one line, and bars of the main number."""
    rows = [_flat({key: value for key, value in record.items() if key not in _CIRCUMSTANCES}) for record in records]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shared = {key for key in keys if len(rows) > 1 and len({row.get(key) for row in rows}) == 1}
    headings = [key for key in keys if key not in shared]
    body = _table(
        [key.replace("_", " ") for key in headings], [[row.get(key, "-") for key in headings] for row in rows]
    )
    told = ", ".join(f"{key} {rows[0][key]}" for key in keys if key in shared and key != "bench")
    for command in dict.fromkeys(record.get("command") for record in records):
        first = next(record for record in records if record.get("command") == command)
        machine = first.get("machine") or {}
        body += _note(
            f"{command}; {machine.get('gpu') or machine.get('cpu')}, {first.get('threads')} threads, "
            f"torch {(first.get('versions') or {}).get('torch')}, commit {str(first.get('commit'))[:10]}"
            f"{' and changes' if first.get('dirty') else ''}, {first.get('date')}"
        )
    return body + _note(f"In all rows: {told}." if told else "") + _figures(_bars(records), "")


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """A record's numbers by name: a median with its least and largest in one cell, other groups one cell each."""
    if isinstance(value, dict) and {"median", "min", "max"} <= value.keys():
        number = _number(value["median"])
        if value["min"] != value["max"]:
            number += f" ({_number(value['min'])} to {_number(value['max'])})"
        return {name: number}
    if isinstance(value, dict):
        return {
            key: cell
            for part, inner in value.items()
            for key, cell in _flat(inner, f"{name}: {part}".removeprefix(": ")).items()
        }
    return {name: _number(value)}


def _number(value: Any) -> str:
    """A value for a table.

    >>> _number(1234567), _number(0.123456), _number(12.3456), _number(None), _number("dsf")
    ('1,234,567', '0.123', '12.3', '-', 'dsf')
    """
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _bars(records: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Bars of the main number of a benchmark, medians with their least and largest, one figure a case."""
    main = next((key for key in _MAIN if any(record.get(key) for record in records)), None)
    if main is None:
        return {}
    cases: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get(main):
            place = [str(record[key]) for key in ("cell", "T", "B", "H", "S", "diagonal", "dtype") if key in record]
            cases.setdefault(" ".join(place), []).append(record)
    drawn = {}
    for case, rows in cases.items():
        names = [" ".join(str(r[key]) for key in ("implementation", "variant", "method") if key in r) for r in rows]
        middle = [r[main]["median"] for r in rows]
        reach = [[r[main]["median"] - r[main]["min"] for r in rows], [r[main]["max"] - r[main]["median"] for r in rows]]
        figure = Figure(figsize=(figures.SIZE[0], 1 + 0.28 * len(rows)), layout="constrained")
        axes = figure.add_subplot(xlabel=main.replace("_", " "))
        axes.barh(range(len(rows)), middle, xerr=reach, color="C0")
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        drawn[case] = figure
    return drawn


# Its parts -----------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def _figures(drawn: dict[str, Figure], title: str) -> str:
    parts = []
    for name, figure in drawn.items():
        caption = html.escape(name.removeprefix(f"{title}: "))
        inside = f"{figures.svg(figure)}<figcaption>{caption}</figcaption>"
        parts.append(f'<figure role="img" aria-label="{caption}">{inside}</figure>')
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _unique(body: str) -> str:
    """The page's body with the names inside every SVG element made its own, since they all use the same ones."""
    parts = re.split(r"(<svg.*?</svg>)", body, flags=re.DOTALL)
    return "".join(
        re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{k}-", part) if k % 2 else part for k, part in enumerate(parts)
    )
