"""The table of torchrecurrent's tasks in docs/custom-cells.md: the newest record of each task, cell and machine."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS, PAGE = ROOT / "results" / "packages" / "torchrecurrent", ROOT / "docs" / "custom-cells.md"
BEGIN = "<!-- From results/packages/torchrecurrent, written by `python -m interop.torchrecurrent_tasks --record`. -->"
END = "<!-- Up to here. -->"
HEAD = """
| task | data | cell | T x B x H | batches | ms of its step | rule | times faster | its score, ours | processor |
|---|---|---|---|---|---|---|---|---|---|
"""


def append(machine: str, record: dict[str, Any]) -> None:
    """Add a record of a machine, and write the table."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    with (RECORDS / f"{machine}.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
    write()


def write() -> None:
    """Replace what is between the two marks of the page."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} must have the lines {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{of(read())}{END}{after}", encoding="utf-8")


def read() -> list[dict[str, Any]]:
    """The records of all machines, the newest of each task, cell and data."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in sorted(RECORDS.glob("*.jsonl")):
        for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            newest[record["task"], record["model"], record["data"], file.stem] = record
    return [newest[key] for key in sorted(newest)]


def of(records: list[dict[str, Any]]) -> str:
    """The table of some records, one row for each rule; nothing where there are none."""
    rows = [row(record, rule) for record in records for rule in record["times_faster"]]
    return HEAD + "".join(rows) + "\n" if records else ""


def row(record: dict[str, Any], rule: str) -> str:
    ratio, scores = record["times_faster"][rule], record["scores"]
    cells = (
        record["task"],
        record["data"],
        record["model"],
        record["shape"],
        str(record["batches"]),
        f"{record['step_ms'][record['package']]['median']:.1f}",
        f"`{rule}`",
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"{record['score']} {scores[record['package']]:.4g}, {scores[rule]:.4g}",
        record["cpu"],
    )
    return f"| {' | '.join(cells)} |\n"
