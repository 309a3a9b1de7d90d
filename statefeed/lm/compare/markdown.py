"""Runs and benchmarks as Markdown: the page docs/measured.md.

Runs of one task are compared with one another, whichever machine made them: it changes a perplexity by no more than
rounding does. Times are those of one machine each. With no record there is no number.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from statefeed.lm.compare.markdown_runs import frontiers, verdicts
from statefeed.lm.compare.measurements import PTB, Record, measurements, place, table
from statefeed.lm.compare.sources import Found
from statefeed.lm.compare.verdicts import Terms

_BASELINES = ("bptt", "ft-bptt")

# The baselines of the layers, and what a row says about them.
_LAYER_BASELINES = {"torch.nn at its best": "", "torch.compile": ", compiled step", "xlstm": ", xlstm package"}


def page(found: Found) -> str:
    """The text of docs/measured.md.

    Args:
        found: the runs and the records of benchmarks.
    """
    return "\n\n".join(
        [
            "<!-- Written by `make measured` from results/; do not edit. -->",
            "# Measurements",
            "## Perplexity and time",
            "Validation perplexity by rule, and time per step where `statefeed bench training` has taken it in turns. "
            "Bold: on the frontier, where no other rule is both faster and better.",
            frontiers(found).rstrip("\n") or "No records yet.",
            "## Differences between rules",
            "Every rule at its own best learning rate, over pairs of runs of one seed and one program, against the two "
            "baselines of the paper; [the rule of the verdicts](training.md#verdicts).",
            "".join(verdicts(found, Terms(rule)) for rule in _BASELINES).rstrip("\n") or "No records yet.",
            "## Layers",
            "Forward and backward, unless a row says forward: times faster than `torch.nn` at its best setting "
            "(below 1: slower). torch has no sLSTM: its baselines are a loop over a step compiled by torch.compile, "
            "and the vanilla backend of the xlstm package.",
            _layers(found).rstrip("\n") or "No records yet.",
            "## Memory",
            "Growth of the peak memory of a process in one forward and backward pass of a layer: of `torch.nn` in MiB, "
            "and of the rules as a share of it (below 1: less).",
            _memory(found).rstrip("\n") or "No records yet.",
            "## Training end to end",
            "A GRU of 256 units on sentences of words: times faster than the published procedure in the same dtype, "
            "and than `torch.nn` at its best setting in the same loop.",
            _training(found).rstrip("\n") or "No records yet.",
            "## Long memory",
            "Share of symbols recalled that a GRU of 64 units saw once, among noise (`statefeed bench recall`; "
            "guessing is right for 0.125). A seed has learnt it where nine in ten were right.",
            _recall(found).rstrip("\n") or "No records yet.",
            "## State tracking",
            "Parity of a bit string that is asked for after every few bits (`statefeed bench tracking`; guessing is "
            "right for 0.5): the last output on strings of the trained length and of twice that length, none of which "
            "was trained on. A seed has learnt it where nine in ten of the long strings were right. The rate of every "
            "cell and rule was chosen on other strings, with a seed that is not shown. minGRU and S4D have exact "
            "gradients only.",
            _tracking(found).rstrip("\n") or "No records yet.",
            "## The adding problem",
            "Squared error of the sum of two marked numbers of a long sequence (`statefeed bench adding`; guessing has "
            "0.167). A seed has solved it where the error is at most 0.01. The rate of every cell and rule is the best "
            "of a grid, with a seed that is not shown. A mean over the seeds that solved it is of their training steps "
            "and of the processor seconds of these steps.",
            (_adding(found).rstrip("\n") or "No records yet.") + "\n",
        ]
    )


def _layers(found: Found) -> str:
    text = ""
    for heading, records in measurements(found, "layers").items():
        cases: dict[str, dict[str, float]] = defaultdict(dict)
        for r in records:
            if r["implementation"] == "statefeed":
                for baseline, named in _LAYER_BASELINES.items():
                    if baseline in r["times_faster_than"]:
                        case = f"{r['cell']} {place(r)} {r['dtype']}{named}"
                        cases[case][r["variant"]] = r["times_faster_than"][baseline]["median"]
        rules = list(dict.fromkeys(rule for case in cases.values() for rule in case))
        body = [
            [case, *(f"{times[rule]:.2f}" if rule in times else "" for rule in rules)] for case, times in cases.items()
        ]
        text += f"{heading}.\n\n{table(['cell, T x B x H', *(f'`{rule}`' for rule in rules)], body)}\n"
    return text


def _memory(found: Found) -> str:
    text = ""
    for heading, records in measurements(found, "memory").items():
        cases: dict[str, dict[str, float]] = defaultdict(dict)
        for r in records:
            name = r["variant"] if r["implementation"] == "statefeed" else r["implementation"]
            cases[f"{r['cell']} {place(r)} {r['dtype']}"][name] = r["peak_bytes"]["median"]
        rules = list(dict.fromkeys(r["variant"] for r in records if r["implementation"] == "statefeed"))
        body = [
            [
                case,
                f"{peaks['torch.nn'] / 2**20:.1f}",
                *(f"{peaks[rule] / peaks['torch.nn']:.2f}" if rule in peaks else "" for rule in rules),
            ]
            for case, peaks in cases.items()
        ]
        head = ["cell, T x B x H", "`torch.nn`, MiB", *(f"`{rule}`" for rule in rules)]
        text += f"{heading}.\n\n{table(head, body)}\n"
    return text


def _training(found: Found) -> str:
    text = ""
    tables = defaultdict(list)
    for heading, records in measurements(found, "training").items():
        for r in records:
            tables[f"{heading}; {r.get('recipe', PTB)}, {r['corpus']}"].append(r)
    for heading, records in tables.items():
        head = ["dtype", "who", "tokens per second", "times the published procedure", "times `torch.nn` at its best"]
        body = [
            [
                r["dtype"],
                f"{r['implementation']}, {r['variant']}" if r["implementation"] != "statefeed" else f"`{r['variant']}`",
                f"{r['tokens_per_s']['median']:,.0f}",
                *(
                    f"{r['times_faster_than'][rival]['median']:.2f}" if rival in r["times_faster_than"] else ""
                    for rival in (f"published {r['dtype']}", "torch.nn at its best")
                ),
            ]
            for r in records
        ]
        text += f"{heading}.\n\n{table(head, body)}\n"
    return text


def _recall(found: Found) -> str:
    text = ""
    for heading, records in measurements(found, "recall").items():
        for (delay, steps), same in _grouped(records, "delay", "steps").items():
            rules = sorted(_grouped(same, "variant").items(), key=lambda item: _sort_key(item[1]))
            body = []
            for (rule,), runs in rules:
                body.append([f"`{rule}`", _over_seeds(runs, "accuracy"), *_learnt(runs)])
            head = ["rule", "accuracy, mean over the seeds", "seeds that learnt it", "at step"]
            text += f"{delay} steps apart, {steps:,} steps of training; {heading}.\n\n{table(head, body)}\n"
    return text


def _tracking(found: Found) -> str:
    text = ""
    for heading, records in measurements(found, "tracking", fewest=3).items():
        for (T, every, H, steps), same in _grouped(records, "T", "every", "H", "steps").items():
            cases = sorted(_grouped(same, "cell", "variant").items(), key=lambda item: _sort_key(item[1]))
            body = [
                [
                    f"{cell} `{rule}`",
                    f"{runs[0]['lr']:g}",
                    _over_seeds(runs, "accuracy"),
                    _over_seeds(runs, "accuracy_twice"),
                    *_learnt(runs),
                ]
                for (cell, rule), runs in cases
            ]
            head = ["cell, rule", "rate", f"{T} bits", f"{2 * T} bits", "seeds that learnt it", "at step"]
            task = f"{T} bits, asked for after every {every}; {H} units, {steps:,} steps of training"
            text += f"{task}; {heading}.\n\n{table(head, body)}\n"
    return text


def _adding(found: Found) -> str:
    text = ""
    for heading, records in measurements(found, "adding", fewest=3).items():
        for (T, H, steps), same in _grouped(records, "T", "H", "steps").items():
            body = []
            for (cell, rule), runs in sorted(_grouped(same, "cell", "variant").items()):
                errors = [r["error"] for r in runs]
                seconds = [r["cpu_seconds"] for r in runs if r["learnt"] is not None]
                body.append(
                    [
                        f"{cell} `{rule}`",
                        f"{runs[0]['lr']:g}",
                        f"{statistics.median(errors):.4f} ({min(errors):.4f} to {max(errors):.4f})",
                        *_learnt(runs),
                        f"{statistics.mean(seconds):.0f}" if seconds else "-",
                    ]
                )
            head = ["cell, rule", "rate", "error, median of the seeds", "seeds that solved it", "at step", "seconds"]
            text += f"{T} steps, {H} units, {steps:,} steps of training; {heading}.\n\n{table(head, body)}\n"
    return text


def _over_seeds(runs: Sequence[Record], key: str) -> str:
    """The mean over the seeds and its range."""
    values = [r[key] for r in runs]
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _learnt(runs: Sequence[Record]) -> list[str]:
    """How many seeds learnt a task, and after how many steps on average."""
    steps = [r["learnt"] for r in runs if r["learnt"] is not None]
    return [f"{len(steps)} of {len(runs)}", f"{statistics.mean(steps):,.0f}" if steps else "-"]


def _grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return groups


def _sort_key(records: Sequence[Record]) -> tuple[float, float, float]:
    """The order of rules: more seeds that learnt it, then sooner, then accuracy."""
    learnt = [r["learnt"] for r in records if r["learnt"] is not None]
    sooner = statistics.mean(learnt) if learnt else 0
    return -len(learnt) / len(records), sooner, -statistics.mean(r["accuracy"] for r in records)
