"""The figures of results: perplexity against epochs, time, width, depth and cell; speed against quality."""

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from statefeed.lm.compare.difference_figure import differences
from statefeed.lm.compare.equal_size import is_of_equal_size
from statefeed.lm.compare.measurements import StepTimes, step_key
from statefeed.lm.compare.panel import curve, legend, panel, places, points
from statefeed.lm.compare.rates import at_best_rate
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.styles import Style, styles
from statefeed.lm.compare.tasks import best_scores, by_rule, setting, size, split, tasks, valid_runs
from statefeed.lm.compare.verdicts import DEFAULT_TERMS, Terms
from statefeed.lm.config import RECURRENT
from statefeed.lm.run.metadata import where

# A rule whose best perplexity is more than this many times the lowest is off the scale, and its name says so: the axis
# shows how the others differ.
MAX_RATIO = 1.25

_AXES = {"model.width": "width, units", "model.layers": "depth, layers"}
_BARS = "mean over the seeds, bars: their range"


def draw(results: Sequence[Result], times: StepTimes | None = None, terms: Terms = DEFAULT_TERMS) -> dict[str, Figure]:
    """Every figure that the results have the runs for, by its title.

    Args:
        results: of any tasks.
        times: of a step, measured in turns. Runs are made one after the other, so their own times are not compared:
            figures with a time are drawn of the tasks and machines that have such a measurement.
        terms: what is asked of the differences between rules.
    """
    figures: dict[str, Figure] = {}
    for title, same in tasks(results).items():
        drawn = {"perplexity against epoch": plot_vs_epochs(same), "alignment with BPTT": alignment(same)}
        drawn["difference"] = differences(same, terms, results)
        for place in dict.fromkeys(where(result.metadata) for result in same):
            if ms := (times or {}).get((step_key(same[0]), place)):
                drawn[f"perplexity against time, {place}"] = plot_vs_time(same, ms, place)
                drawn[f"speed against quality, {place}"] = frontier(same, ms, place)
        figures |= {f"{title}: {form}": figure for form, figure in drawn.items() if figure is not None}
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


def plot_vs_epochs(results: Sequence[Result]) -> Figure | None:
    """Validation perplexity of one task against epochs: mean over the seeds, and their range."""
    return _plot_vs(results, dict.fromkeys(_at_best_rates(results), 1.0), "epochs", "epochs", places(results))


def plot_vs_time(results: Sequence[Result], ms: Mapping[str, float], place: str) -> Figure | None:
    """Validation perplexity of one task against time: its steps times the time of a step, measured in turns.

    Args:
        results: of one task.
        ms: milliseconds of a step by rule.
        place: machine and threads on which they were measured.
    """
    scale = {label: ms[group[0].rule] / 1e3 for label, group in _at_best_rates(results).items() if group[0].rule in ms}
    return _plot_vs(results, scale, "step", "seconds of training", place) if len(scale) > 1 else None


def _at_best_rates(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of every rule at its best learning rate; the name has the rate where the rule has others."""
    rules = split(results, lambda result: result.rule)
    chosen = {rule: at_best_rate(runs)[0].get("train.lr") for rule, runs in rules.items()}
    return {label: runs for label, runs in by_rule(results).items() if runs[0].get("train.lr") == chosen[runs[0].rule]}


def _plot_vs(results: Sequence[Result], scale: Mapping[str, float], what: str, name: str, place: str) -> Figure | None:
    """Perplexity against `what` of every evaluation, times the scale of its rule."""
    groups = _at_best_rates(results)
    best = {label: best_scores(groups[label]) for label in scale if best_scores(groups[label])}
    if not best:
        return None
    figure, axes = panel(name, "validation perplexity", f"{place}; mean over the seeds, shaded: their range")
    low, high = _limits([statistics.mean(found) for found in best.values()])
    style_of = styles(group[0].rule for group in groups.values())
    for label in best:
        style = style_of[groups[label][0].rule]
        evaluations = list(zip(*(result.valid for result in valid_runs(groups[label])), strict=False))
        x = [scale[label] * statistics.mean(row[what] for row in rows) for rows in evaluations]
        y = [[row["perplexity"] for row in rows] for rows in evaluations]
        off = "" if min(map(min, y)) <= high else " (off the scale)"
        curve(axes, x, [statistics.mean(values) for values in y], style, label + off)
        if len(y[0]) > 1:
            axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=style.color, alpha=0.15, linewidth=0)
    axes.set_ylim(low, high)
    legend(figure, axes)
    return figure


def _limits(best: Sequence[float]) -> tuple[float, float]:
    """The range of an axis on which the best perplexities of the rules differ visibly.

    >>> [round(limit) for limit in _limits([130.0, 137.0, 150.0, 400.0])]
    [126, 170]
    """
    lowest = min(best)
    span = max([value for value in best if value <= MAX_RATIO * lowest]) - lowest
    span = max(span, 0.02 * lowest)
    return lowest - 0.2 * span, lowest + 2 * span


def frontier(results: Sequence[Result], ms: Mapping[str, float], place: str) -> Figure | None:
    """Best validation perplexity of every rule of one task against the time of a step, measured in turns.

    Args:
        results: of one task.
        ms: milliseconds of a step by rule.
        place: machine and threads on which they were measured.
    """
    groups = by_rule(results)
    found = {
        label: (ms[group[0].rule], statistics.mean(best_scores(group)))
        for label, group in groups.items()
        if group[0].rule in ms and best_scores(group)
    }
    if len(found) < 2:
        return None
    title = f"{place}; steps timed in turns; gray: no other rule is both faster and better"
    figure, axes = panel("milliseconds of a training step", "best validation perplexity", title)
    for label, style in styles(groups).items():
        if label in found:
            axes.plot(*found[label], linestyle="", marker=style.marker, color=style.color, label=label)
    line = pareto_front(list(found.values()))
    axes.plot(*zip(*line, strict=True), color="0.7", linewidth=1, zorder=0, drawstyle="steps-post")
    axes.margins(0.1)
    legend(figure, axes)
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
    groups = _at_best_rates(results)
    aligned = {label: [r for r in valid_runs(group) if r.alignment] for label, group in groups.items()}
    if not any(aligned.values()):
        return None
    figure, axes = panel("epochs", "cosine with the BPTT gradient", f"{places(results)}; mean over the seeds")
    style_of = styles(group[0].rule for group in groups.values())
    for label, found in aligned.items():
        if found:
            rows = list(zip(*(result.alignment for result in found), strict=False))
            x = [statistics.mean(row["epochs"] for row in same) for same in rows]
            y = [statistics.mean(row["cosine"] for row in same) for same in rows]
            curve(axes, x, y, style_of[found[0].rule], label)
    legend(figure, axes)
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
        title = f"{places(same)}; {_BARS}"
        figure, axes = panel(_AXES[key], "best validation perplexity", title)
        groups = split(same, lambda result: result.rule)
        for label, group in groups.items():
            sized = {value: [result for result in group if result.get(key) == value] for value in values}
            at = {value: best_scores(at_best_rate(found)) for value, found in sized.items() if found}
            points(axes, {value: found for value, found in at.items() if found}, drawn[label], label)
        axes.set_xticks(values, [str(value) for value in values])
        legend(figure, axes)
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
            rivals = [
                r for r in others if any(is_of_equal_size(r.metadata["parameters"], budget) for budget in budgets)
            ]
            cells = split([*sized, *rivals], lambda result: str(result.get("model.cell")))
            if len(cells) > 1:
                title = f"{sized[0].metadata.get('corpus')}, {size(sized[0]).split()[1]}: perplexity by cell"
                figures[_numbered(figures, title)] = _cells(cells, drawn)
    return figures


def _cells(cells: dict[str, list[Result]], drawn: Mapping[str, Style]) -> Figure:
    """A column of points for every cell; points, unlike bars, need no axis from zero."""
    every = [result for group in cells.values() for result in group]
    rules = list(dict.fromkeys(result.rule for result in every if result.get("model.cell") in RECURRENT))
    figure, axes = panel("cell", "best validation perplexity", f"{places(every)}; {_BARS}")
    for k, rule in enumerate(rules):
        of_rule = {cell: [r for r in group if r.rule == rule and cell in RECURRENT] for cell, group in cells.items()}
        shift = 0.6 * ((k + 0.5) / len(rules) - 0.5)
        at = {
            list(cells).index(cell) + shift: best_scores(at_best_rate(found))
            for cell, found in of_rule.items()
            if found
        }
        points(axes, at, drawn[rule], rule, joined=False)
    for place, (cell, group) in enumerate(cells.items()):
        if cell not in RECURRENT:
            points(axes, {place: best_scores(at_best_rate(group))}, Style("C9", "", "h"), cell, joined=False)
    axes.set_xticks(range(len(cells)), list(cells))
    axes.set_xlim(-0.5, len(cells) - 0.5)
    legend(figure, axes)
    return figure


def _numbered(taken: dict[str, Figure], title: str) -> str:
    """The title, numbered where there is one like it."""
    count = sum(other == title or other.startswith(f"{title} (") for other in taken)
    return title if not count else f"{title} ({count + 1})"
