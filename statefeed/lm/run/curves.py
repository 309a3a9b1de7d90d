"""Plot of the learning curves of one run."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def draw(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path, place: str) -> None:
    """Plot the losses against the steps.

    Args:
        curves: step and loss of every row, by split.
        path: path of the PNG file.
        place: machine and threads of the run, in small print above the curves.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    figure.suptitle("\n".join(textwrap.wrap(place, 110)), fontsize=7)
    for split, style in (("train", "-"), ("valid", "o-"), ("test", "s")):
        if curves[split]:
            axes.plot(*zip(*curves[split], strict=True), style, label=split, markersize=4)
            axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
