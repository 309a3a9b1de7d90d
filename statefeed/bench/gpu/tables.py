"""Markdown tables of the records of one GPU: python -m statefeed.bench.gpu.tables FOLDER [DOCUMENT].

With a document, the tables replace what is between its two comments ``BEGIN`` and ``END``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin: statefeed.bench.gpu.tables -->", "<!-- end -->"

Record = dict[str, Any]
_PRECISIONS = {"shipped": "float32 as shipped", "tf32": "TF32", "float32": "float32", "bfloat16": "bfloat16"}
_METHODS = ("auto", "prefix", "fft", "sequential", "accelerated-scan")


def tables(folder: Path) -> str:
    """All tables, of the latest record of every measurement."""
    sections = (layers, training, forward, scan, parity)
    return "\n\n".join("\n".join(section(folder)) for section in sections)


def _read(folder: Path, stage: str, *key: str) -> dict[tuple[Any, ...], Record]:
    """The latest record for every value of these fields, 0 if it lacks one, that holds a measurement."""
    lines = (folder / f"gpu-{stage}.jsonl").read_text(encoding="utf-8").splitlines()
    records = (record for record in map(json.loads, lines) if "not_run" not in record)
    return {tuple(record.get(name, 0) for name in key): record for record in records}


def layers(folder: Path) -> Iterator[str]:
    """Times and memory of a layer under torch.nn, ``"dsf"`` and ``"gate+1"``, of FlashRNN, and of the sLSTM."""
    fields = ("dtype", "cell", "T", "B", "H", "layers", "bidirectional", "packed", "proj_size", "heads", "contender")
    found = _read(folder, "layers", *fields)
    yield "### One layer, forward and backward"
    for dtype, heading in _PRECISIONS.items():
        cases = dict.fromkeys(k[1:-1] for k in found if k[0] == dtype and k[1] != "slstm" and k[-1] == "dsf")
        rows = []
        for case in cases:
            contenders = {name: found.get((dtype, *case, name), {}) for name in ("torch.nn", "dsf", "gate+1")}
            cells = [_case(*case)]
            for mode, ratio in (("ms", "times_faster_than"), ("graph_ms", "graph_times_faster_than")):
                cells.append(_median(contenders["torch.nn"], mode))
                cells += [_with_ratio(contenders[name], mode, ratio) for name in ("dsf", "gate+1")]
            memory = [contenders[name].get("peak_bytes", 0) for name in ("dsf", "torch.nn")]
            rows.append([*cells, f"{memory[0] / memory[1]:.2f}"])
        yield ""
        yield f"**{heading}**, milliseconds (in brackets: times faster than torch.nn)"
        yield ""
        yield from _table(
            ["layer, T x B x H", "torch.nn", "`dsf`", "`gate+1`", "torch.nn, graph", "`dsf`, graph", "`gate+1`, graph",
             "memory, `dsf` / torch.nn"],
            rows,
        )  # fmt: skip
    rivals = [record for key, record in found.items() if key[-1] == "flashrnn"]
    if rivals:
        yield ""
        yield "FlashRNN's exact BPTT in bfloat16, eager: " + ", ".join(
            f"{_case(r['cell'], r['T'], r['B'], r['H'])} {_median(r, 'ms')} ms" for r in rivals
        )
    rows = list(_slstm_rows(found))
    if rows:
        yield ""
        yield "The sLSTM, which torch.nn does not have, milliseconds (in brackets: times faster than `bptt`)"
        yield ""
        yield from _table(
            ["layer, T x B x H", "`bptt`", "`dsf`", "`gate+1`", "`bptt`, graph", "`dsf`, graph", "`gate+1`, graph",
             "memory, `dsf` / `bptt`"],
            rows,
        )  # fmt: skip


def _slstm_rows(found: dict[tuple[Any, ...], Record]) -> Iterator[list[str]]:
    for dtype, *case in dict.fromkeys(k[:-1] for k in found if k[1] == "slstm" and k[-1] == "dsf"):
        contenders = [found.get((dtype, *case, name), {}) for name in ("bptt", "dsf", "gate+1")]
        cells = [f"{_case(*case)}, {_PRECISIONS[dtype]}"]
        for mode, ratio in (("ms", "times_faster_than"), ("graph_ms", "graph_times_faster_than")):
            cells += [_with_ratio(record, mode, ratio, "bptt") for record in contenders]
        memory = [contenders[k].get("peak_bytes") for k in (1, 0)]
        yield [*cells, f"{memory[0] / memory[1]:.2f}" if memory[0] and memory[1] else ""]


def training(folder: Path) -> Iterator[str]:
    """Times and memory of a training step."""
    found = _read(folder, "training", "dtype", "contender")
    yield "### A training step"
    yield ""
    rows = []
    for dtype, heading in _PRECISIONS.items():
        for name in ("torch.nn", "dsf", "gate", "gate+1"):
            if record := found.get((dtype, name)):
                rows.append(
                    [heading, f"`{name}`" if name != "torch.nn" else name,
                     _with_ratio(record, "step_ms", "times_faster_than"),
                     _with_ratio(record, "graph_step_ms", "graph_times_faster_than"),
                     f"{record['peak_bytes'] / 1e9:.1f}"]
                )  # fmt: skip
    yield from _table(["precision", "rule", "step, ms", "step in a CUDA graph, ms", "peak memory, GB"], rows)


def forward(folder: Path) -> Iterator[str]:
    """Times of passes with a sequential and with a parallel forward pass."""
    found = _read(folder, "forward", "dtype", "cell", "T", "B", "H", "contender")
    yield "### A forward pass in parallel over time"
    yield ""
    rows = []
    for case in dict.fromkeys(key[:-1] for key in found):
        parts = {key[-1]: record for key, record in found.items() if key[:-1] == case}
        newton = parts.get("dsf newton(0.0001)")
        if newton is None or "ms" not in newton:
            continue
        plain = parts["torch.nn"]
        against_graph = plain["graph_ms"]["median"] / newton["ms"]["median"]
        rows.append(
            [f"{_case(*case[1:])}, {_PRECISIONS[case[0]]}", _median(plain, "ms"), _median(plain, "graph_ms"),
             _median(parts["dsf sequential"], "ms"), _with_ratio(newton, "ms", "times_faster_than"),
             f"{against_graph:.1f}", str(max(newton["iterations"])), f"{newton['error']:.0e}"]
        )  # fmt: skip
    yield from _table(
        ["layer, T x B x H", "torch.nn, ms", "torch.nn in a CUDA graph, ms", "`dsf`, ms", "`dsf`, parallel forward, ms",
         "times faster than torch.nn's graph", "iterations", "largest error"],
        rows,
    )  # fmt: skip


def scan(folder: Path) -> Iterator[str]:
    """Milliseconds of every method, eager / in a CUDA graph."""
    found = _read(folder, "scan", "T", "S", "diagonal", "method")
    yield "### The scan alone, milliseconds, eager / in a CUDA graph"
    yield ""
    rows = []
    for T, S, diagonal in dict.fromkeys(key[:3] for key in found if key[0]):
        cells = [f"{T} x {S}, {diagonal}"]
        for method in _METHODS:
            record = found.get((T, S, diagonal, method), {})
            cells.append(f"{_median(record, 'ms')} / {_median(record, 'graph_ms')}" if "ms" in record else "")
        rows.append(cells)
    yield from _table(["T x S, diagonal", *(f"`{m}`" if "-" not in m else m for m in _METHODS)], rows)


def parity(folder: Path) -> Iterator[str]:
    """The number of cases and the largest errors per dtype."""
    found = _read(folder, "parity", "cell", "rule", "dtype", "packed", "T", "layers")
    yield "### Parity with float64"
    yield ""
    rows = []
    for dtype in dict.fromkeys(key[2] for key in found):
        records = [record for key, record in found.items() if key[2] == dtype]
        errors = [record["errors"] for record in records if "errors" in record]
        largest = [f"{max(e[kind] for e in errors):.0e}" for kind in ("output", "gradient")]
        rows.append([dtype, str(len(records)), str(len(records) - len(errors)), *largest])
    yield from _table(["dtype", "cases", "failed", "largest error of outputs", "of gradients"], rows)


def _case(
    cell: str,
    T: int,
    B: int,
    H: int,
    layers: int = 1,
    bidirectional: bool = False,
    packed: bool = False,
    proj_size: int = 0,
    heads: int = 0,
) -> str:
    extra = [f"{layers} layers"] * (layers > 1) + ["bidirectional"] * bidirectional + ["packed"] * packed
    extra += [f"proj_size {proj_size}"] * (proj_size > 0) + [f"{heads} heads"] * (heads > 0)
    return ", ".join([f"{cell} {T}x{B}x{H}", *extra])


def _median(record: Record, name: str) -> str:
    if name not in record:
        return ""
    value = record[name]["median"]
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _with_ratio(record: Record, name: str, ratio: str, first: str = "torch.nn") -> str:
    if name not in record:
        return ""
    if record["contender"] == first or ratio not in record:
        return _median(record, name)
    return f"{_median(record, name)} ({record[ratio][first]['median']:.2f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def replaced(document: str, folder: Path) -> str:
    """The text of a document with its tables made from the records of a folder."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(folder)}\n\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str]) -> None:
    """Print the tables, or write them into a document."""
    folder, *documents = map(Path, argv)
    if not documents:
        print(tables(folder))
    for document in documents:
        document.write_text(replaced(document.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
