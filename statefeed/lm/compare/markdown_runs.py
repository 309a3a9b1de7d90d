"""Runs as Markdown tables: perplexity and time by task, and the differences between rules."""

import json
import statistics
from collections.abc import Mapping, Sequence

from statefeed.lm.compare import verdict_tables
from statefeed.lm.compare.equal_size import compare_models
from statefeed.lm.compare.measurements import step_key, step_times, table
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.sources import Found
from statefeed.lm.compare.tasks import by_rule, differing_keys, setting, size, split, tasks
from statefeed.lm.compare.verdicts import Terms, Verdicts, compare_rules
from statefeed.lm.run.metadata import where


def frontiers(found: Found) -> str:
    """For every task one table: rule, seeds, perplexity, and the times of a step that the benchmark has measured."""
    finished = [result for result in found.results if result.outcome == "finished" and result.valid]
    times, text = step_times(found), ""
    for titled in split(finished, _title).values():
        parts = list(split(titled, lambda result: json.dumps(setting(result), sort_keys=True)).values())
        differing = differing_keys([setting(part[0]) for part in parts])
        for part in parts:
            places = sorted({where(result.metadata) for result in part})
            more = "".join(f", {key}={setting(part[0]).get(key)}" for key in differing)
            torch = " and ".join(dict.fromkeys(str(result.metadata.get("torch")) for result in part))
            key = step_key(part[0])
            measured = {place: times[key, place] for place in places if (key, place) in times}
            text += f"{_title(part[0])}; {'; '.join(places)}; torch {torch}{more}.\n\n{_frontier(part, measured)}\n"
    return text


def _title(result: Result) -> str:
    """A task in words, without the keys in which it may differ from others of the same title."""
    corpus = result.metadata.get("corpus") or result.get("data.corpus")
    steps, epochs, precision = (result.get(f"train.{key}") for key in ("steps", "epochs", "precision"))
    length = f"{steps} steps" if steps else f"{epochs} epochs"
    length += f" in {precision}" if precision != "float32" else ""
    batch, context = result.get("train.batch"), result.get("train.context")
    of_step = f"{batch} x {context} tokens"
    if result.get("data.batches") == "sentences":
        of_step = f"{batch} sentences of at most {context} tokens"
    return f"**{corpus}, {result.get('data.tokens')} tokens, {size(result)}**, {length}, {of_step} a step"


def _frontier(results: Sequence[Result], times: Mapping[str, Mapping[str, float]]) -> str:
    """One row per rule: seeds, mean of the best validation perplexities, their range, and time per step.

    Args:
        results: of one task.
        times: milliseconds by rule, by place.
    """
    scores = {label: [r.best for r in group if r.best is not None] for label, group in by_rule(results).items()}
    rules = {label: group[0].rule for label, group in by_rule(results).items()}
    means = {label: statistics.mean(values) for label, values in scores.items()}
    body = []
    for label, mean in sorted(means.items(), key=lambda item: item[1]):
        values, rule = scores[label], rules[label]
        spread = f"{mean:.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")
        row = [f"`{rule}`{label.removeprefix(rule)}", str(len(values)), spread]
        for took in times.values():
            ms = took.get(rule)
            if ms is None:
                row.append("")
                continue
            rivals = [(means[other], took[rules[other]]) for other in means if rules[other] in took]
            dominated = any(p <= mean and t <= ms and (p, t) != (mean, ms) for p, t in rivals)
            row.append(f"{ms:.0f}" if dominated else f"**{ms:.0f}**")
        body.append(row)
    return table(["rule", "seeds", "best validation perplexity", *(f"ms per step, {place}" for place in times)], body)


def verdicts(found: Found, terms: Terms) -> str:
    """Differences between rules: one table for every task with enough pairs; the other tasks in one list."""
    by_task = {title: compare_rules(same, terms, found.results) for title, same in tasks(found.results).items()}
    return _tables({title: compared for title, compared in by_task.items() if compared is not None})


def models(found: Found, terms: Terms) -> str:
    """Differences between models of about as many parameters: one table for every text and training."""
    return _tables(compare_models(found.results, terms))


def _tables(compared: Mapping[str, Verdicts]) -> str:
    text, few = "", dict[str, list[str]]()
    for title, one in compared.items():
        if not one.decidable:
            few.setdefault(one.terms.baseline, []).append(title)
            continue
        headings, rows = verdict_tables.table(one)
        if one.kind == "rule":
            rows = [[f"`{row[0]}`", *row[1:]] for row in rows]
        notes = "".join(f"- {sentence}\n" for sentence in verdict_tables.notes(one))
        text += f"**{title}**, {verdict_tables.title(one.terms)}.\n\n{table(headings, rows)}\n{notes}\n"
    for baseline, titles in few.items():
        listed = "".join(f"- {title}\n" for title in titles)
        text += f"Compared with {baseline}, these have {verdict_tables.TOO_FEW}:\n\n{listed}\n"
    return text
