"""Tables of a comparison on standard output."""

from collections.abc import Collection, Sequence

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table

from statefeed.lm.compare import verdict_tables
from statefeed.lm.compare.equal_size import compare_models
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.tasks import tasks
from statefeed.lm.compare.verdicts import Terms, Verdicts, compare_rules
from statefeed.lm.run import output

COLUMNS, _WIDEST = 80, 1000  # characters: of a usual terminal, and more than any table has


def print_table(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: Collection[int],
    wide: bool,
) -> None:
    """Print a table.

    Args:
        console: where it goes.
        title: a line above it.
        headings: of the columns.
        rows: the cells.
        text: the columns that are text; the others are numbers.
        wide: whether it may be wider than 80 characters and the terminal.
    """
    table = Table(title=title)
    for place, heading in enumerate(headings):
        # Only a rule may be wrapped: a schedule of many stages is as long as it likes.
        table.add_column(heading, justify="left" if place in text else "right", no_wrap=bool(place), overflow="fold")
    for row in rows:
        table.add_row(*row)
    if wide:
        # A row that a terminal wraps can be read, one that is truncated cannot.
        console.width = max(console.width, Measurement.get(console, _unlimited(console), table).maximum)
    else:
        console.width = max(console.width, COLUMNS)
    console.print(table)


def _unlimited(console: Console) -> ConsoleOptions:
    return console.options.update(max_width=_WIDEST)


def print_verdicts(results: Sequence[Result], terms: Terms, wide: bool = False) -> None:
    """Print the verdicts of every task, with what must be known to read them.

    Args:
        results: of any tasks.
        terms: what is asked.
        wide: whether to print one row per rule with every score, which is wider than 80 characters.
    """
    console = output.console()
    for title, same in tasks(results).items():
        found = compare_rules(same, terms, results)
        if found is None:
            rules = {result.rule for result in same}
            if len(rules) > 1:
                named = f"name one of {', '.join(sorted(rules))} with --baseline"
                console.print(f"{title}: no verdict without runs of the baseline {terms.baseline}: {named}")
            continue
        _print(console, title, found, wide)
    for title, found in compare_models(results, terms).items():
        _print(console, title, found, wide)


def _print(console: Console, title: str, found: Verdicts, wide: bool) -> None:
    heading = f"{title}\n{verdict_tables.title(found.terms)}"
    if not found.decidable:
        console.print(f"{title}: {verdict_tables.TOO_FEW}")
    elif wide:
        print_table(console, heading, *verdict_tables.table(found), (0,), wide)
    else:
        print_table(console, heading, *verdict_tables.short_table(found), (0, 1, 4), wide)
    for sentence in verdict_tables.notes(found):
        console.print(f"- {sentence}")
