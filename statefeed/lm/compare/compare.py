"""Owns `statefeed compare`: the same training under several feedback rules, one run folder each, and their table."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

import statefeed as sf
from statefeed.lm import config
from statefeed.lm.compare import figures, report, results
from statefeed.lm.compare.results import Result
from statefeed.lm.config import RECURRENT, Config, UsageError, require
from statefeed.lm.run import checkpoint
from statefeed.lm.run.endings import Interrupted, Refused

_WIDTH = 1000  # characters that no table has
_AGAIN = "the same command goes on from here"


def command(arguments: Sequence[str]) -> None:
    """Carry out `statefeed compare`.

    Args:
        arguments: the words after it.

    Raises:
        UsageError: for a mistake in them, before anything is written, and for a run that cannot be carried out.
        Refused: for a run that has told itself why it cannot be carried out.
        Interrupted: when a run was interrupted; the same command goes on with it.
    """
    flags = config.parser("statefeed compare")
    flags.add_argument("recipe", nargs="?", help="YAML file of these keys; flags override it")
    flags.add_argument("--feedback", type=str, required=True, help="rules or schedules of them, separated by commas")
    flags.add_argument("--seeds", type=int, default=1, help="runs of every rule: train.seed and those after it")
    flags.add_argument(
        "--lr", type=str, default="", help="learning rates of single rules, as dsf=2e-3,bptt=1e-3; others: train.lr"
    )
    flags.add_argument(
        "--out", type=str, default=None, help="folder of the comparison; null is run.dir with -compare behind it"
    )
    for argument in arguments:
        if re.match(r"--(model\.feedback|run\.dir)\b", argument):
            raise UsageError(f"statefeed compare takes --feedback and --out, got {argument}")
    values = config.parse(flags, arguments)
    if values.recipe is not None:
        values = config.parse(flags, [*config.recipe_flags(values.recipe), *arguments])
    recipe = config.build(values)
    folder = Path(values.out or f"{recipe.run.dir}-compare")
    compare(plan(recipe, values.feedback, values.seeds, values.lr, folder), folder)


def plan(recipe: Config, feedback: str, seeds: int, rates: str, folder: Path) -> list[Config]:
    """The recipe of every run, all rules of one seed before those of the next.

    Args:
        recipe: what they have in common.
        feedback: rules, separated by commas.
        seeds: runs of every rule.
        rates: rule=rate, separated by commas, or nothing.
        folder: of the comparison.

    Raises:
        UsageError: for a rule that does not exist or does not fit the cell, a rate for a rule that is not compared, or
            fewer seeds than one.
    """
    require(seeds >= 1, "--seeds must be at least 1", seeds)
    require(
        recipe.model.cell in RECURRENT,
        f"a comparison of rules needs a cell out of {', '.join(RECURRENT)}",
        recipe.model.cell,
    )
    rules = list(dict.fromkeys(rule.strip() for rule in feedback.split(",")))
    require(all(rules), "--feedback must have a rule between its commas", repr(feedback))
    spelled: dict[str, str] = {}
    for rule in rules:
        try:
            schedule = sf.Schedule(rule)
            for _, stage in schedule.stages:
                getattr(sf, recipe.model.cell.upper())(1, 1, feedback=stage)
        except ValueError as error:
            raise UsageError(f"--feedback {rule}: {error}") from error
        other = spelled.setdefault(str(schedule), rule)
        require(other == rule, "--feedback must name a rule once", f"{other} and {rule}, which are the same")
    own = _rates(rates, rules)
    return [
        dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, feedback=_as_read(rule)),
            train=dataclasses.replace(
                recipe.train, seed=recipe.train.seed + k, lr=own.get(rule, recipe.train.lr), alignment=True
            ),
            run=dataclasses.replace(
                recipe.run, dir=str(folder / f"{rule.replace('/', '_')}-seed{recipe.train.seed + k}")
            ),
        )
        for k in range(seeds)
        for rule in rules
    ]


def _as_read(rule: str) -> float | str:
    """A rule as a recipe has it once it was read from YAML, where a number is a number."""
    try:
        return float(rule)
    except ValueError:
        return rule


def _rates(text: str, rules: Sequence[str]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        rule, _, rate = word.strip().rpartition("=")
        require(rule in rules, f"--lr must name rules of --feedback ({', '.join(rules)})", word)
        require(rule not in rates, "--lr must name a rule once", text)
        try:
            rates[rule] = float(rate)
        except ValueError:
            raise UsageError(f"--lr must be rule=rate, such as dsf=2e-3, got {word}") from None
    return rates


def compare(planned: Sequence[Config], folder: Path) -> None:
    """Train what is not trained yet, one record a run, then draw and print what the records of the folder say.

    Args:
        planned: the recipe of every run.
        folder: of the comparison.

    Raises:
        UsageError: when the folder of a planned run holds one of another recipe, or a run cannot be carried out.
        Refused: when a run has told itself why it cannot be carried out.
        Interrupted: when a signal came during a run, which is recorded if it was carried out all the same.
    """
    records = folder / report.COMPARISON
    found = report.read([records]).results if records.exists() and records.stat().st_size else []
    done = {Path(result.get("run.dir")).name: result for result in found}  # the folder may have been moved
    for recipe in planned:
        if (result := done.get(Path(recipe.run.dir).name)) is not None:
            _refuse_other(recipe, result.config, records)
        elif (Path(recipe.run.dir) / checkpoint.CONFIG).exists():
            there = config.load(Path(recipe.run.dir) / checkpoint.CONFIG)
            _refuse_other(recipe, dataclasses.asdict(there), Path(recipe.run.dir))
    console = Console(highlight=False, soft_wrap=True)
    for number, recipe in enumerate(planned, 1):
        if Path(recipe.run.dir).name in done:
            continue
        console.print(
            f"run {number} of {len(planned)}: {recipe.model.feedback}, seed {recipe.train.seed}, "
            f"rate {recipe.train.lr:g}, in {recipe.run.dir}",
            markup=False,
        )
        outcome, caught = _train(recipe)
        result = results.of_run(Path(recipe.run.dir), outcome)
        _add(results.to_line(result), records)
        done[Path(recipe.run.dir).name] = result
        if caught is not None:
            raise Interrupted(f"the comparison was interrupted behind {recipe.run.dir}: {_AGAIN}", caught)
    show(list(done.values()), folder)


def _add(line: str, records: Path) -> None:
    """Add a line to the records; whenever this is interrupted, it is there whole or not at all."""
    unfinished = records.with_suffix(".unfinished")
    lines = records.read_text(encoding="utf-8") if records.exists() else ""
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(lines + line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, records)


def _refuse_other(recipe: Config, there: dict[str, dict[str, object]], place: Path) -> None:
    """Refuse to take a run of another recipe for one of this comparison."""
    expected, got = results.flat(dataclasses.asdict(recipe)), results.flat(there)
    for key, value in expected.items():
        if got.get(key) != value and not key.startswith("run."):
            raise UsageError(
                f"{place} holds a run of another recipe, with {key} {got.get(key)} and not {value}: "
                "choose another folder with --out"
            )


def _train(recipe: Config) -> tuple[str, int | None]:
    """Train, or go on, in a process of its own: its memory is its own and its end is not the comparison's.

    Returns:
        finished or diverged, and the last signal that came meanwhile.

    Raises:
        UsageError, Refused, Interrupted: when it is neither.
    """
    flags = ["--resume"] if (Path(recipe.run.dir) / checkpoint.CONFIG).exists() else []
    flags += [
        f"--{key}={'null' if value is None else value}"
        for key, value in results.flat(dataclasses.asdict(recipe)).items()
    ]
    command = [sys.executable, "-m", "statefeed", "train", *flags]
    told, passed = "", list[int]()
    # In a session of its own it hears of an interruption once, through us, however it was sent.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None

        def pass_on(number: int, _: FrameType | None) -> None:
            passed.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for told in process.stderr:
                if not passed or told.startswith("statefeed: "):  # not where its imports were interrupted
                    sys.stderr.write(told)
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    caught = passed[-1] if passed else None
    if code == 0:
        return "finished", caught
    if code == 1 and "training diverged" in told:
        return "diverged", caught
    if passed or code > 128:
        raise Interrupted(f"the comparison was interrupted in {recipe.run.dir}: {_AGAIN}", caught or code - 128)
    if code == 2 and told.startswith("statefeed: "):
        raise Refused(told)
    ended = f"whose training ended with exit code {code}"
    raise UsageError(f"the comparison stopped in {recipe.run.dir}, {ended}: {_AGAIN}")


def show(compared: Sequence[Result], folder: Path) -> None:
    """Print a table for every task and leave the figures in the folder."""
    console = Console()
    for title, same in results.tasks(compared).items():
        headings, rows = results.table(same)
        table = Table(title=title)
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        # A row that a narrow terminal breaks can be read, one that is cut cannot.
        wide = Measurement.get(console, console.options.update(max_width=_WIDTH), table).maximum
        console.width = max(console.width, wide)  # rich prints nothing wider than its console
        console.print(table)
    names = figures.save(figures.draw(compared), folder)
    console.print(
        f"{folder} keeps the runs, {report.COMPARISON}{''.join(f', {name}' for name in names)}; "
        f"statefeed report {folder} makes one page of it",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
