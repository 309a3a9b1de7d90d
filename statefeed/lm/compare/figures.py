"""The figures of results: perplexity against epochs, time, width, depth and cell; speed against quality."""

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from statefeed.lm.compare.results import Result
from statefeed.lm.compare.styles import Style, styles
from statefeed.lm.compare.tasks import at_best_rate, best_scores, by_rule, setting, size, split, tasks, valid_runs
from statefeed.lm.config import RECURRENT

SIZE = (4.4, 3.2)  # inches: one panel, whose letters can still be read where it is as wide as a phone
# The curves are shown up to this many times the lowest perplexity: above, the rules look alike.
REACH = 2.0
# A model without recurrent cells is a rival of those whose parameters are within this part of its own.
BUDGET = 0.25

# The names of more rules than these stand below the panel, where they cover nothing.
NAMED = 5


def draw(results: Sequence[Result]) -> dict[str, Figure]:
    """Every figure that the results have the runs for, by its title."""
    figures: dict[str, Figure] = {}
    for title, same in tasks(results).items():
        for form, drawn in (
            ("perplexity against epoch", plot_vs(same, "epochs")),
            ("perplexity against time", plot_vs(same, "seconds")),
            ("speed against quality", frontier(same)),
            ("alignment with BPTT", alignment(same)),
        ):
            if drawn is not None:
                figures[f"{title}: {form}"] = drawn
    figures.update(plot_by(results, "model.width", "perplexity against width"))
    figures.update(plot_by(results, "model.layers", "perplexity against depth"))
    figures.update(by_cell(results))
    return figures


def save(drawn: Mapping[str, Figure], folder: Path) -> list[str]:
    """Write figures as SVG files, replacing existing ones; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for title, figure in drawn.items():
        names.append(re.sub(r"[^a-z0-9.+]+", "-", title.lower()).strip("-") + ".svg")
        (folder / names[-1]).write_text(svg(figure), encoding="utf-8")
    return names


def svg(figure: Figure) -> str:
    """A figure as an SVG element, the same for the same results, its letters as text."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "statefeed"}):
        figure.savefig(stream, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def plot_vs(results: Sequence[Result], what: str) -> Figure | None:
    """Validation perplexity of one task against epochs or seconds of training: mean over the seeds, and their range.

    Args:
        results: of one task.
        what: epochs or seconds.
    """
    best = best_scores(results)
    if not best:
        return None
    figure, axes = _panel(f"{what} of training" if what == "seconds" else what, "validation perplexity")
    groups = by_rule(results)
    for label, style in styles(groups).items():
        evaluations = list(zip(*(result.valid for result in valid_runs(groups[label])), strict=False))
        if not evaluations:
            continue
        x = [statistics.mean(row[what] for row in rows) for rows in evaluations]
        y = [[row["perplexity"] for row in rows] for rows in evaluations]
        _curve(axes, x, [statistics.mean(values) for values in y], style, label)
        if len(y[0]) > 1:
            axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=style.color, alpha=0.15, linewidth=0)
    axes.set_ylim(0.97 * min(best), REACH * min(best))
    _legend(figure, axes)
    return figure


def frontier(results: Sequence[Result]) -> Figure | None:
    """Best validation perplexity of every rule of one task against the time of a step; a line joins the best of each.

    Args:
        results: of one task.
    """
    points: dict[str, tuple[float, float]] = {}
    groups = by_rule(results)
    for label, group in groups.items():
        steps = [result.step_ms for result in group if result.step_ms is not None]
        if best_scores(group) and steps:
            points[label] = (statistics.mean(steps), statistics.mean(best_scores(group)))
    if len(points) < 2:
        return None
    figure, axes = _panel("milliseconds of a training step", "best validation perplexity")
    for label, style in styles(groups).items():
        if label in points:
            axes.plot(*points[label], style.marker, color=style.color, label=label)
    line = pareto_front(list(points.values()))
    axes.plot(*zip(*line, strict=True), color="0.7", linewidth=1, zorder=0, drawstyle="steps-post")
    axes.margins(0.1)
    _legend(figure, axes)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points for which no other is at most as large in both places.

    >>> pareto_front([(2, 5), (1, 9), (3, 6), (4, 4)])
    [(1, 9), (2, 5), (4, 4)]
    """
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def alignment(results: Sequence[Result]) -> Figure | None:
    """Cosine of the gradient with exact BPTT against epochs, for the rules of one task that are not exact.

    Args:
        results: of one task.
    """
    groups = by_rule(results)
    aligned = {label: [r for r in valid_runs(group) if r.alignment] for label, group in groups.items()}
    if not any(aligned.values()):
        return None
    figure, axes = _panel("epochs", "cosine with the BPTT gradient")
    for label, style in styles(groups).items():
        if aligned[label]:
            rows = list(zip(*(result.alignment for result in aligned[label]), strict=False))
            x = [statistics.mean(row["epochs"] for row in same) for same in rows]
            _curve(axes, x, [statistics.mean(row["cosine"] for row in same) for same in rows], style, label)
    _legend(figure, axes)
    return figure


def plot_by(results: Sequence[Result], key: str, form: str) -> dict[str, Figure]:
    """Best validation perplexity against a size of the model, of those tasks that differ in nothing else.

    Args:
        results: of any tasks.
        key: model.width or model.layers.
        form: what the figure is called.
    """
    figures: dict[str, Figure] = {}
    drawn = styles(result.rule for result in results)
    for same in split(results, lambda result: str(setting(result, key))).values():
        values = sorted({result.get(key) for result in same if result.best is not None})
        if len(values) < 2:
            continue
        figure, axes = _panel(key.replace("model.", ""), "best validation perplexity")
        groups = split(same, lambda result: result.rule)
        for label, group in groups.items():
            sized = {value: [result for result in group if result.get(key) == value] for value in values}
            at = {value: best_scores(at_best_rate(found)) for value, found in sized.items() if found}
            _points(axes, {value: found for value, found in at.items() if found}, drawn[label], label)
        axes.set_xticks(values, [str(value) for value in values])
        _legend(figure, axes)
        first = same[0]
        layers, width = first.get("model.layers"), first.get("model.width")
        fixed = f"layers {layers}" if key == "model.width" else f"width {width}"
        figures[_numbered(figures, f"{first.metadata.get('corpus')}, {first.get('model.cell')}, {fixed}: {form}")] = (
            figure
        )
    return figures


def by_cell(results: Sequence[Result]) -> dict[str, Figure]:
    """Bars of the best validation perplexity by cell, for every size of a corpus at which several cells were trained.

    Models without recurrent cells are compared with those that have about as many parameters. Every rule has the rate
    that was best for it, and a cell may have its own limit of the gradient's norm.
    """
    figures: dict[str, Figure] = {}
    drawn = styles(result.rule for result in results)
    own = ("model.cell", "model.layers", "model.width", "model.heads", "model.window", "model.modes", "train.clip")
    for same in split(results, lambda result: str(setting(result, *own))).values():
        recurrent = [result for result in same if result.get("model.cell") in RECURRENT and result.best is not None]
        others = [result for result in same if result.get("model.cell") not in RECURRENT and result.best is not None]
        for sized in split(recurrent, lambda r: f"{r.get('model.layers')}x{r.get('model.width')}").values():
            budgets = [result.metadata["parameters"] for result in sized]
            rivals = [r for r in others if any(_equals(r.metadata["parameters"], budget) for budget in budgets)]
            cells = split([*sized, *rivals], lambda result: str(result.get("model.cell")))
            if len(cells) > 1:
                title = f"{sized[0].metadata.get('corpus')}, {size(sized[0]).split()[1]}: perplexity by cell"
                figures[_numbered(figures, title)] = _bars(cells, drawn)
    return figures


def _equals(parameters: int, budget: int) -> bool:
    """Whether a model without recurrent cells is compared with one of some number of parameters."""
    return abs(budget - parameters) <= BUDGET * parameters


def _bars(cells: dict[str, list[Result]], drawn: Mapping[str, Style]) -> Figure:
    rules = list(dict.fromkeys(r.rule for group in cells.values() for r in group if r.get("model.cell") in RECURRENT))
    figure, axes = _panel("", "best validation perplexity")
    width = 0.8 / max(1, len(rules))
    for place, (cell, group) in enumerate(cells.items()):
        if cell not in RECURRENT:
            _bar(axes, place, 0.4, best_scores(at_best_rate(group)), color="C9")
    for k, rule in enumerate(rules):
        color, hatch, first = drawn[rule].color, drawn[rule].hatch, True
        for place, (cell, group) in enumerate(cells.items()):
            mine = [result for result in group if result.rule == rule and cell in RECURRENT]
            if mine:
                found = best_scores(at_best_rate(mine))
                left = place + (k + 0.5) * width - 0.4
                _bar(axes, left, width, found, color=color, hatch=hatch, label=rule if first else None)
                first = False
    axes.set_xticks(range(len(cells)), list(cells))
    axes.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _bar(axes: Axes, place: float, width: float, found: Sequence[float], **style: Any) -> None:
    middle = statistics.mean(found)
    reach = [[middle - min(found)], [max(found) - middle]] if len(found) > 1 else None
    bar = axes.bar(place, middle, width, yerr=reach, **style)
    axes.bar_label(bar, fmt="%.3g", fontsize="x-small", padding=1)


def _points(axes: Axes, at: dict[Any, list[float]], style: Style, label: str) -> None:
    """Means over the seeds with their range."""
    middle = [statistics.mean(found) for found in at.values()]
    reach = [
        [m - min(found) for m, found in zip(middle, at.values(), strict=True)],
        [max(found) - m for m, found in zip(middle, at.values(), strict=True)],
    ]
    look: dict[str, Any] = {"color": style.color, "linestyle": style.line, "marker": style.marker}
    axes.errorbar(list(at), middle, yerr=reach, capsize=2, label=label, **look)


def _curve(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style, label: str) -> None:
    """A line over evaluations, whose points are shown while they do not overlap."""
    marker = style.marker if len(x) <= 60 else None
    axes.plot(x, y, color=style.color, linestyle=style.line, marker=marker, markersize=3, linewidth=1.2, label=label)


def _legend(figure: Figure, axes: Axes) -> None:
    """What is what: within the panel, or below it where the names would cover what they name."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) <= NAMED:
        axes.legend()
        return
    columns = 2 if max(map(len, names)) <= 24 else 1
    figure.set_figheight(SIZE[1] + 0.2 * -(-len(names) // columns))
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small")


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _numbered(taken: dict[str, Figure], title: str) -> str:
    """The title, numbered where there is one like it."""
    count = sum(other == title or other.startswith(f"{title} (") for other in taken)
    return title if not count else f"{title} ({count + 1})"
