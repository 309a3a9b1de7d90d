"""The picture of README.md: whole training steps of other people's packages, plain and swapped, from the records.

``python tests/interop/picture.py``, as ``make measured`` does.
"""

from typing import Any

import matplotlib as mpl
import table
from matplotlib.figure import Figure

PICTURE = table.ROOT / "docs" / "_static" / "packages.svg"
# Losses of the last step that differ by less than this are called the same: the orders of summation differ.
_SAME = 1e-3


def draw(records: list[dict[str, Any]]) -> Figure:
    """Bars of the milliseconds of a step, the largest gain first, with the ratio and the last losses."""
    records = sorted(records, key=lambda record: record["step_ratio"]["median"])
    figure = Figure(figsize=(8, 0.32 * len(records) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, record in enumerate(records):
        for offset, way, color, hatch in ((0.2, "plain", "0.75", ""), (-0.2, "statefeed", "tab:blue", "//")):
            spread = record["step_ms"][way]
            low, high = spread["median"] - spread["min"], spread["max"] - spread["median"]
            axes.barh(
                place + offset, spread["median"], 0.38, color=color, hatch=hatch, edgecolor="white",
                xerr=[[low], [high]], ecolor="black", capsize=2,
                label={"plain": "torch.nn", "statefeed": 'sf.swap(model), "bptt"'}[way] if not place else None,
            )  # fmt: skip
        ratio, losses = record["step_ratio"]["median"], record["losses"]
        same = abs(losses["plain"] - losses["statefeed"]) <= _SAME * abs(losses["plain"])
        loss = "same loss" if same else f"loss {losses['plain']:.4g}, {losses['statefeed']:.4g}"
        largest = max(record["step_ms"][way]["max"] for way in ("plain", "statefeed"))
        axes.text(1.08 * largest, place, f"{ratio:.2f}x, {loss}", va="center", fontsize=8)
    axes.set_yticks(range(len(records)), [f"{r['package']}: {r['model']}" for r in records], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=12 * axes.get_xlim()[1])
    axes.set_xlabel("ms of a whole training step (log scale; lines: range of seven fits)", fontsize=9)
    machines = sorted({f"{r['cpu']}, {r['threads']} thread, torch {r['versions']['torch']}" for r in records})
    axes.set_title("; ".join(machines), fontsize=9)
    axes.legend(loc="center right", fontsize=8)
    return figure


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "statefeed"
    draw(table.read()).savefig(PICTURE, metadata={"Date": None})
