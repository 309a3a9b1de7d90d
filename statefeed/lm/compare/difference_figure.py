"""The figure of the differences to the baseline: one row per rule, with its interval and its seeds."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from statefeed.lm.compare.panel import SIZE, panel, places
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.styles import styles
from statefeed.lm.compare.verdicts import LEVEL, SCORES, Terms, compare_rules


def differences(same: Sequence[Result], terms: Terms, every: Sequence[Result]) -> Figure | None:
    """The relative differences of the best validation perplexities of one task; None without an interval.

    Args:
        same: the runs of one task.
        terms: what is asked.
        every: runs of any task, in which the rates of shorter runs are looked for.
    """
    found = compare_rules(same, terms, every)
    shown = [] if found is None else [r for r in found.comparisons if SCORES[0] in r.differences]
    if not any(rule.differences[SCORES[0]].interval for rule in shown):
        return None
    paired = [run for rule in shown for both in rule.pairs.runs for run in both]
    figure, axes = panel(
        f"best validation perplexity, % above {terms.baseline}",
        "rule",
        f"{places(paired)}; mean over the pairs, bars: {LEVEL:.0%} interval, small points: seeds; no bar: fewer pairs",
    )
    figure.set_figheight(SIZE[1] * (0.45 + 0.1 * len(shown)))
    style_of = styles([terms.baseline, *(rule.name for rule in shown)])
    for row, rule in enumerate(shown):
        difference, style = rule.differences[SCORES[0]], style_of[rule.name]
        seeds = [100 * math.expm1(log) for log in difference.logs if math.isfinite(log)]
        axes.plot(seeds, [row + 0.25] * len(seeds), linestyle="", marker="o", markersize=2.5, color="0.4")
        if not math.isfinite(difference.mean):
            continue
        middle = 100 * math.expm1(difference.mean)
        low, high = (100 * math.expm1(end) for end in difference.interval or (difference.mean, difference.mean))
        reach = [[middle - low], [high - middle]] if difference.interval else None
        axes.errorbar([middle], [row], xerr=reach, capsize=3, linestyle="", marker=style.marker, color=style.color)
    axes.axvline(0, color="black", linewidth=1)
    if terms.within is not None:
        axes.axvline(100 * terms.within, color="black", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(shown)), [rule.name for rule in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    return figure
