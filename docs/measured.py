"""Writes docs/measured.md, and the figures of README.md, from the records under results/: python docs/measured.py

Training runs are folders that `statefeed train` leaves (metrics.jsonl, config.yaml, record.json) or the records of
`statefeed compare`; benchmarks are those of `statefeed bench` layers, training and recall. Runs that differ in rule,
rate and seed alone are compared with one another, whichever machine made them: it changes a perplexity by no more than
rounding does. Times are those of one machine each. Nothing is copied by hand: with no record there is no number.
"""

import json
import re
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
    flat |= {f"facts.{key}": facts.get(key) for key in ("corpus", "torch")}
    flat["facts.device"] = facts.get("device", "cpu")  # as in records older than the key
    return flat


def title(setting, places, differing):
    """One setting in words, with every key in which it differs from others, and where its runs were made."""
    corpus = setting["facts.corpus"] or setting["data.corpus"]
    s = {key.partition(".")[2]: value for key, value in setting.items()}
    length = f"{s['steps']} steps" if s.get("steps") else f"{s['epochs']} epochs"
    if s.get("precision", "float32") != "float32":
        length += f" in {s['precision']}"
    more = "".join(f", {key}={setting.get(key)}" for key in differing)
    return (
        f"**{corpus}, {s['tokens']} tokens, {s['cell']} {s['layers']}x{s['width']}**, {length}, {s['batch']} x "
        f"{s['context']} tokens a step; {'; '.join(places)}; torch {s['torch']}{more}."
    )


def table(head, body):
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def where(facts):
    """The processor and threads of a run, as benchmarks name theirs; on a GPU the device."""
    place = facts.get("device", "cpu")
    if place == "cpu":
        place, _, _ = facts["machine"].rsplit(", ", 2)  # without cores and system
    return f"{place}, {facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"


def frontier(runs, times):
    """One row a rule: seeds, mean of the best validation perplexities, their range, and time per step.

    Args:
        runs: rule, rate and perplexity of each.
        times: milliseconds by rule, by place: those that the benchmark took of the rules in turns; runs made one after
            the other tell none.
    """
    by_rule = defaultdict(list)
    rates = defaultdict(set)
    for rule, rate, _ in runs:
        rates[rule].add(rate)
    for rule, rate, perplexity in runs:
        by_rule[rule, f" at {rate:g}" if len(rates[rule]) > 1 else ""].append(perplexity)
    means = {key: statistics.mean(found) for key, found in by_rule.items()}
    body = []
    for (rule, rate), perplexity in sorted(means.items(), key=lambda item: item[1]):
        every = by_rule[rule, rate]
        spread = f"{perplexity:.1f}" + (f" ({min(every):.1f} to {max(every):.1f})" if len(every) > 1 else "")
        row = [f"`{rule}`{rate}", str(len(every)), spread]
        for took in times.values():
            ms = took.get(rule)
            beaten = ms is None or any(
                other in took and p <= perplexity and took[other] <= ms and (p, took[other]) != (perplexity, ms)
                for (other, _), p in means.items()
            )
            row.append("" if ms is None else f"{ms:.0f}" if beaten else f"**{ms:.0f}**")
        body.append(row)
    return table(["rule", "seeds", "best validation perplexity", *(f"ms per step, {place}" for place in times)], body)


def training(results):
    groups, places = defaultdict(list), defaultdict(dict)
    for config, facts, perplexity in results_in(results):
        key = json.dumps(setting(config, facts), sort_keys=True)
        cell = config["model"]["cell"]
        rule = str(config["model"]["feedback"]) if cell in RULED else cell
        groups[key].append((rule, config["train"]["lr"], perplexity))
        places[key][where(facts)] = None
    titled = defaultdict(list)
    for key in groups:
        titled[title(json.loads(key), [], [])].append(key)
    times, text = in_turns(results), ""
    for alike in titled.values():
        found = {key: json.loads(key) for key in alike}
        parts = sorted({part for one in found.values() for part in one})
        differing = [part for part in parts if len({json.dumps(one.get(part)) for one in found.values()}) > 1]
        for key, one in found.items():
            taken = {place: times[_timed(one), place] for place in sorted(places[key]) if (_timed(one), place) in times}
            text += f"{title(one, sorted(places[key]), differing)}\n\n{frontier(groups[key], taken)}\n"
    return text


def in_turns(results):
    """Milliseconds of a step by rule, by what they depend on and place: measured by `statefeed bench training`."""
    found = defaultdict(dict)
    for circumstances, records in measurements(results, "training").items():
        place, _, _ = circumstances.rpartition(", torch ")
        for r in records:
            if r["implementation"] == "statefeed":
                key = tuple(r[part] for part in ("cell", "layers", "width", "batch", "context", "dtype"))
                found[key, place][r["variant"]] = r["step_ms"]["median"]
    return found


def _timed(setting):
    model = [setting[f"model.{key}"] for key in ("cell", "layers", "width")]
    return *model, setting["train.batch"], setting["train.context"], setting.get("train.precision", "float32")


def _place(record):
    return record["machine"]["gpu"] or record["machine"]["cpu"]


def measurements(results, bench, files="**/*.jsonl"):
    """The records of one benchmark by the circumstances that their table is headed with; trials are left out."""
    found = defaultdict(list)
    for file in sorted(results.glob(files)):
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
            "Bold: on the frontier, where no other rule is both faster and better.",
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


def instructions(records):
    """Which instruction set the fused kernels were compiled for, in words."""
    told = (r["kernels"]["forward"] for r in records if r.get("kernels"))
    found = (re.search(r"for (\S+),", words) for words in told)
    return next((f", kernels for {match[1]}" for match in found if match), "")


def newest(item):
    return max(r["date"] for r in item[1])


def summary(results):
    """The figures of the README: of every machine single layers under "dsf", on the most threads, and training.

    They are those of records that lie in the folder itself; measured.md has all.
    """
    layers, told, text = {}, [], ""
    for circumstances, records in sorted(measurements(results, "layers", "*.jsonl").items(), key=newest):
        most = layers.get(_place(records[0]))
        if most is None or most[1][0]["threads"] <= records[0]["threads"]:
            layers[_place(records[0])] = circumstances, records
    if layers:
        text += (
            'One layer under `"dsf"`, forward and backward: times faster than `torch.nn` at its best for that shape.'
        )
        text += "\n\n"
    for circumstances, records in layers.values():
        cases = defaultdict(dict)
        for r in records:
            if r["implementation"] == "statefeed" and r["variant"] == "dsf":
                median = r["times_faster_than"]["torch.nn at its best"]["median"]
                cases[f"{r['T']} x {r['B']} x {r['H']}"][r["cell"], r["dtype"]] = f"{median:.1f}"
        columns = list(dict.fromkeys(column for found in cases.values() for column in found))
        columns.sort(key=lambda column: (column[1] != "float32", ("rnn", "gru", "lstm").index(column[0])))
        head = ["T x B x H", *(f"{cell.upper()} {dtype}" for cell, dtype in columns)]
        body = [[case, *(values.get(column, "") for column in columns)] for case, values in cases.items()]
        text += f"{circumstances}{instructions(records)}:\n\n{table(head, body)}\n"
    for circumstances, records in sorted(measurements(results, "training", "*.jsonl").items(), key=newest):
        ours = [r for r in records if r["implementation"] == "statefeed" and r.get("recipe", PTB) == PTB]
        best = ", ".join(
            f"{r['times_faster_than']['published float32']['median']:.1f} in {r['dtype']} "
            f"({r['tokens_per_s']['median']:,.0f} tokens per second)"
            for r in ours
            if r["variant"] == "dsf"
        )
        told += [f"- {circumstances}{instructions(ours)}: {best}\n"] if best else []
    if told:
        text += (
            "Training end to end, a GRU of 256 units on Penn Treebank, times faster than the published procedure "
            f"in float32:\n\n{''.join(told)}\n"
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
