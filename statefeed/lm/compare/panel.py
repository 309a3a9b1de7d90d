"""One panel of a figure: its axes, its lines and points, its legend."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from statefeed.lm.compare.results import Result
from statefeed.lm.compare.styles import Style
from statefeed.lm.run.metadata import where

SIZE = (4.4, 3.2)  # inches: one panel, whose letters can still be read where it is as wide as a phone


def panel(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    """One panel with a line in small print about where it was measured, and how spreads are shown."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    figure.suptitle("\n".join(textwrap.wrap(title, 78)), fontsize=6.5)
    axes.grid(alpha=0.3)
    return figure, axes


def curve(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style, label: str) -> None:
    """A line over evaluations with about ten of its points marked."""
    every = max(1, len(x) // 10)
    options: dict[str, Any] = {
        "color": style.color,
        "linestyle": style.line,
        "marker": style.marker,
        "markevery": every,
    }
    axes.plot(x, y, markersize=4, linewidth=1.2, label=label, **options)


def points(axes: Axes, at: dict[Any, list[float]], style: Style, label: str, joined: bool = True) -> None:
    """Means over the seeds with their range, joined by a line where the places are sizes of one thing."""
    middle = [statistics.mean(found) for found in at.values()]
    reach = [
        [m - min(found) for m, found in zip(middle, at.values(), strict=True)],
        [max(found) - m for m, found in zip(middle, at.values(), strict=True)],
    ]
    line = style.line if joined else ""
    options: dict[str, Any] = {"color": style.color, "linestyle": line, "marker": style.marker, "markersize": 5}
    axes.errorbar(list(at), middle, yerr=reach, capsize=2, label=label, **options)


def legend(figure: Figure, axes: Axes) -> None:
    """The names of the lines and points, below the panel, where they cover none of them."""
    names = axes.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, names)) <= 24 else 1
    figure.set_figheight(SIZE[1] + 0.2 * -(-len(names) // columns))
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small")


def places(results: Sequence[Result]) -> str:
    """The machines and threads of some runs."""
    return " and ".join(sorted({where(result.metadata) for result in results}))
