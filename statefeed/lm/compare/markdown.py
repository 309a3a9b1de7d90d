"""Runs and benchmarks as Markdown: the page docs/measured.md.

Runs of one task are compared with one another, whichever machine made them: it changes a perplexity by no more than
rounding does. Times are those of one machine each. With no record there is no number.
"""

from collections import defaultdict

from statefeed.lm.compare.markdown_accuracy import long_memory, tracking
from statefeed.lm.compare.markdown_runs import frontiers, models, verdicts
from statefeed.lm.compare.measurements import PTB, measurements, place, table
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
            "## Models of equal size",
            "Models of about as many parameters, trained alike, each at its own best learning rate, against the first "
            "of them under exact BPTT and under `dsf`. A pair has one seed, and so one order of the text.",
            "".join(models(found, Terms(rule)) for rule in ("bptt", "dsf")).rstrip("\n") or "No records yet.",
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
            "Tasks that are answered after the last step of a long sequence. Recall: which of eight symbols the "
            "first step had, among noise (`statefeed bench recall`; guessing is right for 0.125). Adding problem: "
            "the sum of two marked numbers (`statefeed bench adding`; guessing has a squared error of 0.167). "
            "Digits: handwritten digits of scikit-learn, one pixel a step (`statefeed bench digits`; guessing is "
            "right for one in ten). A seed has solved a task where nine in ten answers are right, or the squared "
            "error is at most 0.01. The rate of every cell and rule is the best of a grid, with a seed that is not "
            "shown, or the only one tried; (edge) marks the lowest or highest of the grid. Steps and processor "
            "seconds to solved are means over the seeds that solved it.",
            long_memory(found).rstrip("\n") or "No records yet.",
            "## State tracking",
            "Parity of a bit string that is asked for after every few bits (`statefeed bench tracking`; guessing is "
            "right for 0.5): the last output on strings of the trained length and of twice that length, none of which "
            "was trained on. A seed has learned it where nine in ten of the long strings were right. The rate of every "
            "cell and rule was chosen on other strings, with a seed that is not shown. minGRU and S4D have exact "
            "gradients only.",
            (tracking(found).rstrip("\n") or "No records yet.") + "\n",
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
