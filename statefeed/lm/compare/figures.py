"""Figures of results: perplexity against epochs, time, width, depth and cell; speed against quality."""

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

SIZE = (4.4, 3.2)  # inches: a panel whose text is readable on a phone
# Upper limit of the perplexity axis as a multiple of the lowest perplexity.
Y_LIMIT = 2.0
# A model without recurrent cells is compared with models whose parameters differ by at most this fraction of its own.
PARAMETER_TOLERANCE = 0.25

# With more rules than this the legend is below the panel, where it covers no curve.
INNER_LEGEND = 5


def draw(results: Sequence[Result]) -> dict[str, Figure]:
    """All figures that the results have enough runs for, by title."""
    figures: dict[str, Figure] = {}
    for title, of_task in tasks(results).items():
        for form, drawn in (
            ("perplexity against epoch", plot_vs(of_task, "epochs")),
            ("perplexity against time", plot_vs(of_task, "seconds")),
            ("speed against quality", frontier(of_task)),
            ("alignment with BPTT", alignment(of_task)),
        ):
            if drawn is not None:
                figures[f"{title}: {form}"] = drawn
    figures.update(plot_by(results, "model.width", "perplexity against width"))
    figures.update(plot_by(results, "model.layers", "perplexity against depth"))
    figures.update(by_cell(results))
    return figures


def save(drawn: Mapping[str, Figure], folder: Path) -> list[str]:
    """Write figures as SVG files, replacing existing files, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for title, figure in drawn.items():
        names.append(re.sub(r"[^a-z0-9.+]+", "-", title.lower()).strip("-") + ".svg")
        (folder / names[-1]).write_text(svg(figure), encoding="utf-8")
    return names


def svg(figure: Figure) -> str:
    """A figure as a deterministic SVG element, with letters as text."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "statefeed"}):
        figure.savefig(stream, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def plot_vs(results: Sequence[Result], what: str) -> Figure | None:
    """Plot validation perplexity of one task against epochs or seconds of training: mean and range over seeds.

    Args:
        results: results of one task.
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
    axes.set_ylim(0.97 * min(best), Y_LIMIT * min(best))
    _legend(figure, axes)
    return figure


def frontier(results: Sequence[Result]) -> Figure | None:
    """Plot the best validation perplexity of every rule of one task against the time of a step, with the Pareto front.

    Args:
        results: results of one task.
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
    """The Pareto front of points to minimize in both coordinates.

    >>> pareto_front([(2, 5), (1, 9), (3, 6), (4, 4)])
    [(1, 9), (2, 5), (4, 4)]
    """
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def alignment(results: Sequence[Result]) -> Figure | None:
    """Plot the cosine of the gradient with exact BPTT against epochs, for the approximate rules of one task.

    Args:
        results: results of one task.
    """
    groups = by_rule(results)
    aligned = {label: [r for r in valid_runs(group) if r.alignment] for label, group in groups.items()}
    if not any(aligned.values()):
        return None
    figure, axes = _panel("epochs", "cosine with the BPTT gradient")
    for label, style in styles(groups).items():
        if aligned[label]:
            rows = list(zip(*(result.alignment for result in aligned[label]), strict=False))
            x = [statistics.mean(row["epochs"] for row in seeds) for seeds in rows]
            _curve(axes, x, [statistics.mean(row["cosine"] for row in seeds) for seeds in rows], style, label)
    _legend(figure, axes)
    return figure


def plot_by(results: Sequence[Result], key: str, form: str) -> dict[str, Figure]:
    """Plot the best validation perplexity against a size of the model, over tasks that are otherwise equal.

    Args:
        results: results of any tasks.
        key: model.width or model.layers.
        form: the name of the figure.
    """
    figures: dict[str, Figure] = {}
    drawn = styles(result.rule for result in results)
    for comparable in split(results, lambda result: str(setting(result, key))).values():
        values = sorted({result.get(key) for result in comparable if result.best is not None})
        if len(values) < 2:
            continue
        figure, axes = _panel(key.replace("model.", ""), "best validation perplexity")
        groups = split(comparable, lambda result: result.rule)
        for label, group in groups.items():
            sized = {value: [result for result in group if result.get(key) == value] for value in values}
            at = {value: best_scores(at_best_rate(found)) for value, found in sized.items() if found}
            _points(axes, {value: found for value, found in at.items() if found}, drawn[label], label)
        axes.set_xticks(values, [str(value) for value in values])
        _legend(figure, axes)
        first = comparable[0]
        layers, width = first.get("model.layers"), first.get("model.width")
        fixed = f"layers {layers}" if key == "model.width" else f"width {width}"
        figures[_numbered(figures, f"{first.metadata.get('corpus')}, {first.get('model.cell')}, {fixed}: {form}")] = (
            figure
        )
    return figures


def by_cell(results: Sequence[Result]) -> dict[str, Figure]:
    """Bars of the best validation perplexity by cell, for every size at which several cells were trained.

    Models without recurrent cells are compared with models of about as many parameters. Every rule is shown at its best
    learning rate. Cells may differ in ``train.clip``.
    """
    figures: dict[str, Figure] = {}
    drawn = styles(result.rule for result in results)
    varied = ("model.cell", "model.layers", "model.width", "model.heads", "model.window", "model.modes", "train.clip")
    for comparable in split(results, lambda result: str(setting(result, *varied))).values():
        scored = [result for result in comparable if result.best is not None]
        recurrent = [result for result in scored if result.get("model.cell") in RECURRENT]
        others = [result for result in scored if result.get("model.cell") not in RECURRENT]
        for sized in split(recurrent, lambda r: f"{r.get('model.layers')}x{r.get('model.width')}").values():
            budgets = [result.metadata["parameters"] for result in sized]
            rivals = [r for r in others if any(_similar(r.metadata["parameters"], budget) for budget in budgets)]
            cells = split([*sized, *rivals], lambda result: str(result.get("model.cell")))
            if len(cells) > 1:
                title = f"{sized[0].metadata.get('corpus')}, {size(sized[0]).split()[1]}: perplexity by cell"
                figures[_numbered(figures, title)] = _bars(cells, drawn)
    return figures


def _similar(parameters: int, budget: int) -> bool:
    """Whether a model without recurrent cells is compared with a model of ``budget`` parameters."""
    return abs(budget - parameters) <= PARAMETER_TOLERANCE * parameters


def _bars(cells: dict[str, list[Result]], drawn: Mapping[str, Style]) -> Figure:
    rules = list(dict.fromkeys(r.rule for group in cells.values() for r in group if r.get("model.cell") in RECURRENT))
    figure, axes = _panel("", "best validation perplexity")
    width = 0.8 / max(1, len(rules))
    for x, (cell, group) in enumerate(cells.items()):
        if cell not in RECURRENT:
            _bar(axes, x, 0.4, best_scores(at_best_rate(group)), color="C9")
    for k, rule in enumerate(rules):
        color, hatch, first = drawn[rule].color, drawn[rule].hatch, True
        for x, (cell, group) in enumerate(cells.items()):
            of_rule = [result for result in group if result.rule == rule and cell in RECURRENT]
            if of_rule:
                scores = best_scores(at_best_rate(of_rule))
                offset = (k + 0.5) * width - 0.4
                _bar(axes, x + offset, width, scores, color=color, hatch=hatch, label=rule if first else None)
                first = False
    axes.set_xticks(range(len(cells)), list(cells))
    axes.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _bar(axes: Axes, x: float, width: float, scores: Sequence[float], **style: Any) -> None:
    mean = statistics.mean(scores)
    error = [[mean - min(scores)], [max(scores) - mean]] if len(scores) > 1 else None
    bar = axes.bar(x, mean, width, yerr=error, **style)
    axes.bar_label(bar, fmt="%.3g", fontsize="x-small", padding=1)


def _points(axes: Axes, at: dict[Any, list[float]], style: Style, label: str) -> None:
    """Means over the seeds with their range."""
    means = [statistics.mean(scores) for scores in at.values()]
    error = [
        [mean - min(scores) for mean, scores in zip(means, at.values(), strict=True)],
        [max(scores) - mean for mean, scores in zip(means, at.values(), strict=True)],
    ]
    options: dict[str, Any] = {"color": style.color, "linestyle": style.line, "marker": style.marker}
    axes.errorbar(list(at), means, yerr=error, capsize=2, label=label, **options)


def _curve(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style, label: str) -> None:
    """A line over evaluations, with markers if there are few enough not to overlap."""
    marker = style.marker if len(x) <= 60 else None
    axes.plot(x, y, color=style.color, linestyle=style.line, marker=marker, markersize=3, linewidth=1.2, label=label)


def _legend(figure: Figure, axes: Axes) -> None:
    """Add a legend inside the panel, or below it if there are many rules."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) <= INNER_LEGEND:
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


def _numbered(figures: dict[str, Figure], title: str) -> str:
    """The title, with a number if a figure has the same title."""
    count = sum(other == title or other.startswith(f"{title} (") for other in figures)
    return title if not count else f"{title} ({count + 1})"
