"""The table of docs/packages.md: the newest record of every package, model and machine in results/packages."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS, PAGE = ROOT / "results" / "packages", ROOT / "docs" / "packages.md"
BEGIN, END = "<!-- From results/packages, written by `make interop RECORD=MACHINE`. -->", "<!-- Up to here. -->"
HEAD = """
| package | model | T x B x H | ms of a plain step | ratio | last loss, plain and statefeed | processor |
|---|---|---|---|---|---|---|
"""


def write() -> None:
    """Replace what is between the two marks of the page."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} must have the lines {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{of(read())}{END}{after}", encoding="utf-8")


def read() -> list[dict[str, Any]]:
    """The records of all machines, the newest of each package, model and machine."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in sorted(RECORDS.glob("*.jsonl")):
        for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            newest[file.stem, record["package"], record["model"]] = record
    return [newest[key] for key in sorted(newest)]


def of(records: list[dict[str, Any]]) -> str:
    """The table of some records; nothing where there are none."""
    return HEAD + "".join(map(row, records)) + "\n" if records else ""


def row(record: dict[str, Any]) -> str:
    ratio, losses = record["step_ratio"], record["losses"]
    cells = (
        f"{record['package']} {record['versions'][record['package']]}",
        record["model"],
        record["shape"],
        f"{record['step_ms']['plain']['median']:.1f}",
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"{losses['plain']:.5g}, {losses['statefeed']:.5g}",
        record["cpu"],
    )
    return f"| {' | '.join(cells)} |\n"
