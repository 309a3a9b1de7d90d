"""The page of `statefeed report`: one file of HTML that needs nothing from outside."""

import html
from collections.abc import Sequence
from pathlib import Path

from statefeed.lm.atomic_file import write_output
from statefeed.lm.compare import benchmarks, elements, figures, verdict_tables
from statefeed.lm.compare.equal_size import compare_models
from statefeed.lm.compare.measurements import step_times
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.sources import Found
from statefeed.lm.compare.table import format_value, table
from statefeed.lm.compare.tasks import tasks
from statefeed.lm.compare.verdicts import DEFAULT_TERMS, Terms, Verdicts, compare_rules

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin-bottom: .5rem; }
p { overflow-wrap: anywhere; } .note { color: #555; font-size: .85rem; }
nav ul { padding-left: 1.2rem; } a { color: #0550ae; }
.table { overflow-x: auto; border: 1px solid #ddd; border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { background: #f6f6f6; font-weight: 600; white-space: normal; vertical-align: bottom; }
td.long { white-space: normal; min-width: 10rem; text-align: left; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th:first-child { background: #f6f6f6; }
@media (min-width: 70rem) { td { white-space: normal; } }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere;
  min-width: 7rem; } }
.figures { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; }
"""


def write(found: Found, output: Path, terms: Terms = DEFAULT_TERMS) -> None:
    """Write the page.

    Args:
        found: what it shows.
        output: where it goes; an existing page is replaced.
        terms: what is asked of the differences between rules.
    """
    write_output(output, page(found, terms))


def page(found: Found, terms: Terms = DEFAULT_TERMS) -> str:
    """The page as text: for every task a table of its rules and its figures, sizes and cells, then the benchmarks."""
    drawn = figures.draw(found.results, step_times(found), terms)
    sections: list[tuple[str, str]] = []
    for title, same in tasks(found.results).items():
        of_task = {name: drawn.pop(name) for name in list(drawn) if name.startswith(f"{title}: ")}
        body = elements.table(*table(same)) + elements.note(_about(same))
        body += _verdicts(compare_rules(same, terms, found.results))
        body += elements.figure_grid(of_task, title)
        sections.append((title, body))
    sections += [(title, _verdicts(models)) for title, models in compare_models(found.results, terms).items()]
    if drawn:
        sections.append(("Over sizes and cells", elements.figure_grid(drawn)))
    for name in dict.fromkeys(record["bench"] for record in found.benchmarks):
        records = [record for record in found.benchmarks if record["bench"] == name]
        sections.append((f"statefeed bench {name}", benchmarks.section(records)))
    contents = "".join(f'<li><a href="#s{k}">{html.escape(title)}</a></li>' for k, (title, _) in enumerate(sections))
    body = "".join(f'<section id="s{k}"><h2>{html.escape(t)}</h2>{b}</section>' for k, (t, b) in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>statefeed report</title><style>{_STYLE}</style></head><body>"
        f"<h1>statefeed report</h1><nav><ul>{contents}</ul></nav>{elements.unique_ids(body)}</body></html>\n"
    )


def _verdicts(found: Verdicts | None) -> str:
    """Verdicts with their notes; nothing without runs of the baseline."""
    if found is None:
        return ""
    if found.decidable:
        body = elements.heading(verdict_tables.title(found.terms)) + elements.table(*verdict_tables.table(found))
    else:
        body = elements.note(f"Difference to {found.terms.baseline}: {verdict_tables.TOO_FEW}.")
    return body + elements.note(" ".join(verdict_tables.notes(found)))


def _about(same: Sequence[Result]) -> str:
    """Under which conditions the runs of one task were made."""
    metadata = [result.metadata for result in same]

    def all_of(key: str) -> str:
        return " and ".join(dict.fromkeys(format_value(one[key]) for one in metadata if key in one))

    return (
        f"{all_of('parameters')} parameters. Perplexity: mean and standard deviation over the seeds of the best "
        "evaluation. Epochs and seconds to: the first evaluation that reaches what the named rule ends with, seed by "
        "seed; seconds are those of training, evaluations left out. These runs were made one after the other, so their "
        "times do not say which rule is faster; `statefeed bench training` times the rules in turns. "
        f"torch {all_of('torch')}, threads: {all_of('threads')}, {all_of('machine')}."
    )
