"""Writes docs/measured.md, and the figures of README.md, from the records under results/: python docs/measured.py

Training runs are folders that `statefeed train` leaves (metrics.jsonl, config.yaml, record.json) or the records of
`statefeed compare`; benchmarks are those of `statefeed bench` layers, training and recall. Runs that differ in rule,
rate and seed alone are compared with one another. Nothing is copied by hand: with no record there is no number.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

import yaml

DOCS = Path(__file__).resolve().parent
FEWEST_REPEATS = 5  # fewer are a trial
RULED = ("rnn", "gru", "lstm")  # other cells have no feedback rule
PTB = "ptb-gru-1x256"  # the recipe of `statefeed bench training`, and the only one of older records


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results_in(folder):
    """Every training run under a folder as (config, facts, best validation perplexity).

    They are run folders, and lines of the records that `statefeed compare` writes.
    """
    found = {}
    for path in sorted(folder.rglob("*.jsonl")):
        lines = rows(path)
        if path.name == "metrics.jsonl" and (path.parent / "config.yaml").exists():
            config = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
            record = path.parent / "record.json"
            facts = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
            valid = [row["perplexity"] for row in lines if row["split"] == "valid"]
            if valid:
                found[json.dumps([config, facts])] = config, facts, min(valid)
        else:
            for line in lines:
                if line.get("outcome") == "finished" and line["valid"]:
                    best = min(row["perplexity"] for row in line["valid"])
                    config, facts = line["config"], line["facts"]
                    found[json.dumps([config, facts])] = config, facts, best  # its folder may be there too: once
    return list(found.values())


def setting(config, facts):
    """What runs must have in common to be compared: all but rule, rate, seed and places."""
    flat = {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}
    varied = ("model.feedback", "train.lr", "train.seed", "train.alignment", "run.dir", "data.path")
    for key in (*varied, "train.device", "train.parallel", "train.compile"):
        flat.pop(key, None)
    flat |= {f"facts.{key}": facts.get(key) for key in ("corpus", "machine", "threads", "torch")}
    flat["facts.device"] = facts.get("device", "cpu")  # as in records older than the key
    return flat


def title(setting, differing):
    """One setting in words, with every key in which it differs from others."""
    corpus = setting["facts.corpus"] or setting["data.corpus"]
    s = {key.partition(".")[2]: value for key, value in setting.items()}
    length = f"{s['steps']} steps" if s.get("steps") else f"{s['epochs']} epochs"
    threads = f"{s['threads']} thread{'s' if s['threads'] != 1 else ''}"
    if s.get("precision", "float32") != "float32":
        length += f" in {s['precision']}"
    more = "".join(f", {key}={setting.get(key)}" for key in differing)
    return (
        f"**{corpus}, {s['tokens']} tokens, {s['cell']} {s['layers']}x{s['width']}**, {length}, {s['batch']} x "
        f"{s['context']} tokens a step; {threads}, {s['machine']}, torch {s['torch']}{more}."
    )


def table(head, body):
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def frontier(runs, times):
    """One row a rule: seeds, mean of the best validation perplexities, their range, and time per step.

    Times are those that the benchmark took of the rules in turns; runs made one after the other tell none.
    """
    by_rule = defaultdict(list)
    rates = defaultdict(set)
    for rule, rate, _ in runs:
        rates[rule].add(rate)
    for rule, rate, perplexity in runs:
        by_rule[rule, f" at {rate:g}" if len(rates[rule]) > 1 else ""].append(perplexity)
    points = {key: (statistics.mean(found), times.get(key[0])) for key, found in by_rule.items()}
    body = []
    for (rule, rate), (perplexity, ms) in sorted(points.items(), key=lambda item: item[1][0]):
        every = by_rule[rule, rate]
        spread = f"{perplexity:.1f}" + (f" ({min(every):.1f} to {max(every):.1f})" if len(every) > 1 else "")
        row = [f"`{rule}`{rate}", str(len(every)), spread]
        if times:
            beaten = ms is None or any(
                m is not None and p <= perplexity and m <= ms and (p, m) != (perplexity, ms) for p, m in points.values()
            )
            row += ["" if ms is None else f"{ms:.0f}", "" if beaten else "yes"]
        body.append(row)
    head = ["rule", "seeds", "best validation perplexity"]
    return table([*head, "ms per step", "on the frontier"] if times else head, body)


def training(results):
    groups = defaultdict(list)
    for config, facts, perplexity in results_in(results):
        key = json.dumps(setting(config, facts), sort_keys=True)
        cell = config["model"]["cell"]
        rule = str(config["model"]["feedback"]) if cell in RULED else cell
        groups[key].append((rule, config["train"]["lr"], perplexity))
    titled = defaultdict(list)
    for key in groups:
        titled[title(json.loads(key), [])].append(json.loads(key))
    times, text = in_turns(results), ""
    for alike in titled.values():
        keys = sorted({key for found in alike for key in found})
        differing = [key for key in keys if len({json.dumps(found.get(key)) for found in alike}) > 1]
        for found in alike:
            runs = groups[json.dumps(found, sort_keys=True)]
            text += f"{title(found, differing)}\n\n{frontier(runs, times[_timed(found)])}\n"
    return text


def in_turns(results):
    """Milliseconds of a step by rule, by what they depend on: measured by `statefeed bench training`."""
    found = defaultdict(dict)
    for records in measurements(results, "training").values():
        for r in records:
            if r["implementation"] == "statefeed":
                key = (
                    *(r[part] for part in ("cell", "layers", "width", "batch", "context", "dtype")),
                    r["threads"],
                    _place(r),
                )
                found[key][r["variant"]] = r["step_ms"]["median"]
    return found


def _timed(setting):
    model = [setting[f"model.{key}"] for key in ("cell", "layers", "width")]
    precision = setting.get("train.precision", "float32")
    sizes = setting["train.batch"], setting["train.context"]
    device = setting["facts.device"]
    if device == "cpu":
        device, _, _ = setting["facts.machine"].rsplit(", ", 2)  # without cores and system
    return *model, *sizes, precision, setting["facts.threads"], device


def _place(record):
    return record["machine"]["gpu"] or record["machine"]["cpu"]


def measurements(results, bench):
    """The records of one benchmark by the circumstances that their table is headed with; trials are left out."""
    found = defaultdict(list)
    for file in sorted(results.rglob("*.jsonl")):
        for r in rows(file):
            if r.get("bench") == bench and r["repeats"] >= FEWEST_REPEATS:
                threads = f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}"
                found[f"{_place(r)}, {threads}, torch {r['versions']['torch']}"].append(r)
    return found


def benchmarks(results):
    text = ""
    for circumstances, records in measurements(results, "layers").items():
        cases = defaultdict(dict)
        for r in records:
            if r["implementation"] == "statefeed":
                case = f"{r['cell']} {r['T']}x{r['B']}x{r['H']} {r['dtype']}"
                cases[case][r["variant"]] = r["times_faster_than"]["torch.nn at its best"]["median"]
        rules = list(dict.fromkeys(rule for found in cases.values() for rule in found))
        body = [
            [case, *(f"{found[rule]:.2f}" if rule in found else "" for rule in rules)] for case, found in cases.items()
        ]
        text += f"{circumstances}.\n\n{table(['cell, T x B x H', *(f'`{rule}`' for rule in rules)], body)}\n"
    return text


def end_to_end(results):
    text = ""
    found = defaultdict(list)
    for circumstances, records in measurements(results, "training").items():
        for r in records:
            found[f"{circumstances}; {r.get('recipe', PTB)}, {r['corpus']}"].append(r)
    for circumstances, records in found.items():
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
        text += f"{circumstances}.\n\n{table(head, body)}\n"
    return text


def learning(records):
    """What sorts rules from the best: more seeds that learnt it, then sooner, then accuracy."""
    learnt = [r["learnt"] for r in records if r["learnt"] is not None]
    sooner = statistics.mean(learnt) if learnt else 0
    return -len(learnt) / len(records), sooner, -statistics.mean(r["accuracy"] for r in records)


def recall(results):
    text = ""
    for circumstances, records in measurements(results, "recall").items():
        by_task = defaultdict(lambda: defaultdict(list))
        for r in records:
            by_task[r["delay"], r["steps"]][r["variant"]].append(r)
        for (delay, steps), by_rule in by_task.items():
            body = []
            for rule, found in sorted(by_rule.items(), key=lambda item: learning(item[1])):
                accuracy = [r["accuracy"] for r in found]
                learnt = [r["learnt"] for r in found if r["learnt"] is not None]
                body.append(
                    [
                        f"`{rule}`",
                        f"{statistics.mean(accuracy):.2f} ({min(accuracy):.2f} to {max(accuracy):.2f})",
                        f"{len(learnt)} of {len(found)}",
                        f"{statistics.mean(learnt):,.0f}" if learnt else "-",
                    ]
                )
            head = ["rule", "accuracy, mean over the seeds", "seeds that learnt it", "at step"]
            text += f"{delay} steps apart, {steps:,} steps of training; {circumstances}.\n\n{table(head, body)}\n"
    return text


def page(results):
    """The text of measured.md."""
    return "\n\n".join(
        [
            "<!-- Written by docs/measured.py from results/; do not edit. -->",
            "Validation perplexity by rule, and time per step where `statefeed bench training` has taken it in turns. "
            "A rule is on the frontier where no other is both faster and better.",
            training(results).rstrip("\n") or "No records yet.",
            "One layer, forward and backward: times faster than `torch.nn` at its best setting (below 1: slower).",
            benchmarks(results).rstrip("\n") or "No records yet.",
            "Training end to end, a GRU of 256 units on sentences of words: times faster than the published procedure "
            "in the same dtype, and than `torch.nn` at its best setting in the same loop.",
            end_to_end(results).rstrip("\n") or "No records yet.",
            "Long memory: share of symbols recalled that a GRU of 64 units saw once, among noise (`statefeed bench "
            "recall`; guessing is right for 0.125). A seed has learnt it where nine in ten were right.",
            (recall(results).rstrip("\n") or "No records yet.") + "\n",
        ]
    )


def newest(item):
    return max(r["date"] for r in item[1])


def summary(results):
    """The figures of the README: single layers under "dsf" on the most threads measured, and training end to end.

    They are of the machine that was measured last; measured.md has all.
    """
    text = ""
    found = measurements(results, "layers")
    for circumstances, records in sorted(found.items(), key=lambda item: (item[1][0]["threads"], newest(item)))[-1:]:
        cases = defaultdict(dict)
        for r in records:
            if r["implementation"] == "statefeed" and r["variant"] == "dsf":
                median = r["times_faster_than"]["torch.nn at its best"]["median"]
                cases[f"{r['T']} x {r['B']} x {r['H']}"][r["cell"], r["dtype"]] = f"{median:.1f}"
        columns = list(dict.fromkeys(column for found in cases.values() for column in found))
        columns.sort(key=lambda column: (column[1] != "float32", ("rnn", "gru", "lstm").index(column[0])))
        head = ["T x B x H", *(f"{cell.upper()} {dtype}" for cell, dtype in columns)]
        body = [[case, *(values.get(column, "") for column in columns)] for case, values in cases.items()]
        text += (
            'One layer under `"dsf"`, forward and backward: times faster than `torch.nn` at its best setting for that '
            f"shape.\n{circumstances}.\n\n{table(head, body)}\n"
        )
    for circumstances, records in sorted(measurements(results, "training").items(), key=newest)[-1:]:
        ours = [r for r in records if r["implementation"] == "statefeed" and r.get("recipe", PTB) == PTB]
        best = [r for r in ours if r["variant"] == "dsf"]
        if not best:
            continue
        told = ", ".join(
            f"{r['times_faster_than']['published float32']['median']:.1f} in {r['dtype']} "
            f"({r['tokens_per_s']['median']:,.0f} tokens per second)"
            for r in best
        )
        text += (
            "Training end to end, a GRU of 256 units on Penn Treebank, times faster than the published procedure "
            f"in float32: {told}.\n{circumstances}.\n\n"
        )
    return text


BEGIN, END = "<!-- From results/, written by docs/measured.py. -->\n", "<!-- Up to here. -->"


def with_summary(readme, results):
    """The text of README.md with its figures renewed."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{summary(results)}{END}{after}"


if __name__ == "__main__":
    RESULTS, README = DOCS.parent / "results", DOCS.parent / "README.md"
    (DOCS / "measured.md").write_text(page(RESULTS), encoding="utf-8")
    README.write_text(with_summary(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
