"""The table and the figure of ``statefeed bench layers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from statefeed.bench.measure import machine_line
from statefeed.lm.compare.measurements import place

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_BASELINES = {
    "torch.nn as shipped": "x nn shipped",
    "torch.nn at its best": "x nn best",
    "torch.nn padded": "x nn padded",
    "published": "x published",
    "torch.compile": "x compiled step",
    "xlstm": "x xlstm",
}
_BEST = ("torch.nn at its best", "torch.compile")  # the main baseline of a record: the first that it has
_HATCHES = ("", "//", "..", "xx", "--", "oo")


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per record."""
    from rich.table import Table

    baselines = [name for name in _BASELINES if any(name in r["times_faster_than"] for r in records)]
    result = Table(
        title="one stack of layers: median of the repetitions (min-max)",
        caption="x: times faster than (below 1: slower), per repetition; *: torch.nn at its best; limit: the products "
        "of the pass at this machine's best rate",
    )
    for heading in ("cell", "T x B x H", "dtype", "what"):
        result.add_column(heading, no_wrap=True)
    for heading in ("forward ms", "backward ms", "ms", *(_BASELINES[name] for name in baselines), "of limit"):
        result.add_column(heading, justify="right", no_wrap=True)
    before = None
    for r in records:
        case = (r["cell"], place(r), r["dtype"])
        if before not in (None, case):
            result.add_section()
        is_best = r["implementation"] == "torch.nn" and r["variant"] == r["torch_nn_best"]
        result.add_row(
            *(case if case != before else ("", "", "")),
            f"{r['implementation']} {r['variant']}" + (" *" if is_best else ""),
            *(f"{r[phase]['median']:.2f}" if phase in r else "-" for phase in ("forward_ms", "backward_ms")),
            f"{r['ms']['median']:.2f} ({r['ms']['min']:.2f} to {r['ms']['max']:.2f})",
            *(_ratio(r["times_faster_than"].get(name), name in _BEST) for name in baselines),
            f"{r['part_of_limit']:.0%}",
        )
        before = case
    return result


def narrow_table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per record in at most 80 characters: medians, and the case in a row of its own."""
    from rich.table import Table

    baselines = [
        name
        for name in ("torch.nn as shipped", *_BEST, "torch.nn padded")
        if any(name in r["times_faster_than"] for r in records)
    ]
    result = Table(
        title="one stack of layers: medians",
        caption="x: times faster than (below 1: slower), per repetition; *: torch.nn at its best; the records have the "
        "phases and the ranges",
    )
    result.add_column("what", overflow="fold")
    for heading in ("ms", *(_BASELINES[name] for name in baselines)):
        result.add_column(heading, justify="right", no_wrap=True)
    before = None
    for r in records:
        case = f"{r['cell']} {place(r)} {r['dtype']}"
        if case != before:
            result.add_section()
            result.add_row(f"[bold]{case}[/bold]")
        is_best = r["implementation"] == "torch.nn" and r["variant"] == r["torch_nn_best"]
        result.add_row(
            f"{r['implementation']} {r['variant']}" + (" *" if is_best else ""),
            f"{r['ms']['median']:.2f}",
            *(_ratio(r["times_faster_than"].get(name), ranged=False) for name in baselines),
        )
        before = case
    return result


def _ratio(found: dict[str, float] | None, ranged: bool) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.2f}" + (f" ({found['min']:.2f} to {found['max']:.2f})" if ranged else "")


def _name(record: dict[str, Any]) -> str:
    """What a record is called in the legend."""
    if record["implementation"] in ("torch.nn", "torch.nn padded", "torch.compile", "xlstm"):
        return str(record["implementation"])
    return "published procedure" if record["implementation"] == "published" else str(record["variant"])


def _shown(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> bool:
    """Whether a record is drawn: of torch.nn the setting with the lowest median of each case."""
    if record["implementation"] not in ("torch.nn", "torch.nn padded"):
        return True
    key = ("cell", "dtype", "implementation")
    rivals = [r for r in records if place(r) == place(record) and all(r[k] == record[k] for k in key)]
    return record is min(rivals, key=lambda r: float(r["ms"]["median"]))


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """For every cell and dtype: times faster than the main baseline, and milliseconds."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r["cell"], r["dtype"]) for r in records))
    places = list(dict.fromkeys(place(r) for r in records))
    names = list(dict.fromkeys(_name(r) for r in records))
    result = Figure(figsize=(6 + 1.6 * len(places), 3.2 * len(panels)), layout="constrained")
    axes = result.subplots(len(panels), 2, squeeze=False)
    width = 0.8 / len(names)
    for (left, right), (cell, dtype) in zip(axes, panels, strict=True):
        rows = [r for r in records if (r["cell"], r["dtype"]) == (cell, dtype) and _shown(r, records)]
        best = next(name for name in _BEST if name in rows[0]["times_faster_than"])
        for k, name in enumerate(names):
            found = {places.index(place(r)): r for r in rows if _name(r) == name}
            for panel, values in (
                (left, [r["times_faster_than"][best] for r in found.values()]),
                (right, [r["ms"] for r in found.values()]),
            ):
                middle = [v["median"] for v in values]
                reach = [[v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values]]
                at = [p + (k + 0.5) * width - 0.4 for p in found]
                panel.bar(at, middle, width, yerr=reach, label=name, color=f"C{k}", hatch=_HATCHES[k % len(_HATCHES)])
        left.axhline(1, color="black", linewidth=0.8)
        left.set(ylabel=f"times faster than {best}", yscale="log", title=f"{cell}, {dtype}")
        right.set(ylabel="milliseconds", yscale="log", title=f"{cell}, {dtype}")
        for panel in (left, right):
            panel.set_xticks(range(len(places)), [text.replace(" ", "\n", 1) for text in places], fontsize=7)
            panel.set_xlabel("steps x sequences x width", fontsize=7)
            panel.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    result.suptitle(
        f"{machine_line(records)}\nbars: medians of the repetitions; error bars: minimum to maximum", fontsize=9
    )
    return result
