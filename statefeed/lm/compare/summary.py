"""The figures in README.md and the verdicts in results/README.md, from records."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from statefeed.lm.atomic_file import write_output
from statefeed.lm.compare import markdown_runs
from statefeed.lm.compare.measurements import PTB, Record, instructions, kind, machine, measurements, newest, table
from statefeed.lm.compare.sources import Found
from statefeed.lm.compare.verdicts import Terms
from statefeed.lm.errors import UsageError

BEGIN, END = "<!-- From results/, written by `make measured`. -->\n", "<!-- Up to here. -->"
VERDICTS = "<!-- Verdicts, written by `make measured`. -->\n"


# What the head, the kernels of the layer and the rule add, one after the other.
_SPLIT = ("torch", "bptt", "dsf")


def update_summary(path: Path, found: Found) -> None:
    """Replace what is between the two marks of a file, README.md, by `summary`.

    Raises:
        UsageError: when the file has no such marks.
    """
    _update(path, BEGIN, summary(found), "--summary")


def update_verdicts(path: Path, found: Found, terms: Terms) -> None:
    """Replace what is between the two marks of a file, results/README.md, by the verdicts.

    They are those of the rules of every task, and of models of equal size.

    Raises:
        UsageError: when the file has no such marks.
    """
    _update(path, VERDICTS, markdown_runs.verdicts(found, terms) + markdown_runs.models(found, terms), "--verdicts")


def _update(path: Path, mark: str, new: str, flag: str) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"{flag} must name a file with the lines {mark.strip()} and {END}, got {path}")
    write_output(path, f"{before}{mark}\n{new}{END}{after}")


def summary(found: Found) -> str:
    """The figures of README.md: of every machine single layers, exact and under "dsf", and training."""
    text = _packed_summary(found)
    dense = _of_best_threads(found, "")
    if dense:
        text += (
            "T steps of B sequences and H units, one layer, forward and backward: times faster than `torch.nn` at the "
            'best of its settings for that shape, under `"bptt"` (exact) / under `"dsf"` (the approximate rule of the '
            "paper). Where the ratio is large, torch.nn spends its time on several calls per step, not on "
            "arithmetic.\n\n"
        )
    for heading, records in dense:
        rules = [(rule, "torch.nn at its best") for rule in ("bptt", "dsf")]
        text += f"{heading}{instructions(records)}:\n\n{_pairs(records, rules)}\n"
    lines = []
    for heading, records in sorted(measurements(found, "training").items(), key=newest):
        ours = [r for r in records if r["implementation"] == "statefeed" and r.get("recipe", PTB) == PTB]
        by_dtype: dict[str, dict[str, Record]] = defaultdict(dict)
        for r in ours:
            by_dtype[r["dtype"]][r["variant"]] = r
        parts = [
            f"{' / '.join(_times(rules[rule]) for rule in _SPLIT)} in {dtype} "
            f'(`"bptt"`: {rules["bptt"]["tokens_per_s"]["median"]:,.0f} tokens per second)'
            for dtype, rules in by_dtype.items()
            if rules.keys() >= set(_SPLIT)
        ]
        lines += [f"- {heading}{instructions(ours)}: {', '.join(parts)}\n"] if parts else []
    if lines:
        text += (
            "Whole training steps of a language model, a GRU of 256 units on Penn Treebank: times faster than "
            "`torch.nn` at its best in the same loop and precision, with torch's own layer and statefeed's softmax "
            'head / with its layer too, under `"bptt"` / under `"dsf"`. On one CPU '
            "thread an approximate rule gains only a few percent of such a step.\n\n"
            f"{''.join(lines)}\n"
        )
    return text


def _times(record: Record) -> str:
    return f"{record['times_faster_than']['torch.nn at its best']['median']:.1f}"


def _packed_summary(found: Found) -> str:
    text = ""
    packed = _of_best_threads(found, "packed")
    if packed:
        text += (
            "Packed sequences of T/2 to T steps, B of them, H units, one layer, forward and backward, "
            '`"bptt"` (exact): times faster than `torch.nn` on the same packed batch / on the padded batch, where it '
            "computes the padding too.\n\n"
        )
    for heading, records in packed:
        rivals = [("bptt", "torch.nn at its best"), ("bptt", "torch.nn padded")]
        text += f"{heading}{instructions(records)}:\n\n{_pairs(records, rivals)}\n"
    return text


def _of_best_threads(found: Found, wanted: str) -> list[tuple[str, list[Record]]]:
    """Of every machine the heading and the records of layers of one kind, with its largest number of threads."""
    best: dict[str, tuple[str, list[Record]]] = {}
    for heading, every in sorted(measurements(found, "layers").items(), key=newest):
        records = [record for record in every if kind(record) == wanted and record["dtype"] != "float64"]
        if records:
            most = best.get(machine(records[0]))
            if most is None or most[1][0]["threads"] <= records[0]["threads"]:
                best[machine(records[0])] = heading, records
    return list(best.values())


def _pairs(records: Sequence[Record], shown: Sequence[tuple[str, str]]) -> str:
    """A table of shapes by cell and dtype, each field with one ratio for every rule and baseline."""
    cases: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(lambda: ["-"] * len(shown)))
    for r in records:
        for k, (rule, baseline) in enumerate(shown):
            if r["implementation"] == "statefeed" and r["variant"] == rule and baseline in r["times_faster_than"]:
                median = r["times_faster_than"][baseline]["median"]
                cases[f"{r['T']} x {r['B']} x {r['H']}"][r["cell"], r["dtype"]][k] = f"{median:.1f}"
    columns = list(dict.fromkeys(column for case in cases.values() for column in case))
    columns.sort(key=lambda column: (column[1] != "float32", ("rnn", "gru", "lstm").index(column[0])))
    head = ["T x B x H", *(f"{cell.upper()} {dtype}" for cell, dtype in columns)]
    body = [
        [case, *(" / ".join(values[column]) if column in values else "" for column in columns)]
        for case, values in cases.items()
        if 2 * len(values) >= len(columns)  # docs/measured.md has the shapes of a single cell
    ]
    return table(head, body)
