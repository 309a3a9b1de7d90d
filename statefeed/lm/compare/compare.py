"""A comparison: the same training under several feedback rules, and their table."""

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from statefeed.lm import identity
from statefeed.lm import recipe as recipes
from statefeed.lm.atomic_file import write_text
from statefeed.lm.compare import figures
from statefeed.lm.compare.results import Result, to_line
from statefeed.lm.compare.run_result import read_run
from statefeed.lm.compare.sources import COMPARISON, read
from statefeed.lm.compare.table import short_table
from statefeed.lm.compare.table import table as comparison
from statefeed.lm.compare.tasks import tasks
from statefeed.lm.compare.terminal import print_table, print_verdicts
from statefeed.lm.compare.verdicts import DEFAULT_TERMS, Terms
from statefeed.lm.config import Config
from statefeed.lm.errors import Interrupted, UsageError
from statefeed.lm.run import output
from statefeed.lm.run.files import CONFIG
from statefeed.lm.run.signals import handled

_RESUME = "the same command resumes it"


def compare(planned: Sequence[Config], folder: Path, terms: Terms, wide: bool = False) -> None:
    """Train what is not trained yet, one record per run, then draw and print what the records of the folder say.

    Args:
        planned: the recipe of every run.
        folder: of the comparison.
        terms: what is asked of it.
        wide: whether to print every column, and not only those that fit 80 characters.

    Raises:
        UsageError: the folder of a planned run holds a run of another recipe, or a run failed.
        Interrupted: a signal arrived during a run; the run is recorded if it finished nevertheless.
    """
    records = folder / COMPARISON
    found = read([records]).results if records.exists() and records.stat().st_size else []
    done = {Path(result.get("run.dir")).name: result for result in found}  # the folder may have been moved
    for config in planned:
        if (result := done.get(Path(config.run.dir).name)) is not None:
            _check_same_run(config, result.config, records)
        elif (Path(config.run.dir) / CONFIG).exists():
            existing = recipes.load(Path(config.run.dir) / CONFIG)
            _check_same_run(config, dataclasses.asdict(existing), Path(config.run.dir))
    console = output.console(soft_wrap=True)
    for number, config in enumerate(planned, 1):
        if Path(config.run.dir).name in done:
            continue
        console.print(
            f"run {number} of {len(planned)}: {config.model.feedback}, seed {config.train.seed}, "
            f"rate {config.train.lr:g}, in {config.run.dir}",
        )
        outcome, caught = train_in_subprocess(config)
        result = read_run(Path(config.run.dir), outcome)
        add_record(to_line(result), records)
        done[Path(config.run.dir).name] = result
        if caught is not None:
            raise Interrupted(f"the comparison was interrupted after {config.run.dir}: {_RESUME}", caught)
    show(list(done.values()), folder, terms, wide)


def add_record(line: str, records: Path) -> None:
    """Append a line to the records atomically."""
    lines = records.read_text(encoding="utf-8") if records.exists() else ""
    write_text(records, lines + line)


def _check_same_run(config: Config, existing: identity.Recipe, path: Path) -> None:
    """Raise if an existing run is not the planned one."""
    if found := identity.difference(existing, dataclasses.asdict(config)):
        key, old, new = found
        raise UsageError(
            f"{path} holds a run of another recipe, with {key} {old} and not {new}: choose another folder with --out"
        )


def train_in_subprocess(config: Config) -> tuple[str, int | None]:
    """Train or resume a run in a subprocess, so that its memory and its errors do not affect the comparison.

    Returns:
        "finished" or "diverged", and the last signal that arrived meanwhile.

    Raises:
        UsageError, Interrupted: the run ended in another way.
    """
    flags = ["--resume"] if (Path(config.run.dir) / CONFIG).exists() else []
    flags += [
        f"--{key}={'null' if value is None else value}"
        for key, value in identity.flat(dataclasses.asdict(config)).items()
    ]
    command = [sys.executable, "-m", "statefeed", "train", "--brief", *flags]
    sentence, passed, early = "", list[int](), list[int]()
    running: list[subprocess.Popen[str]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        passed.append(number)
        if running:
            running[0].send_signal(number)
        else:  # the subprocess has not been started yet
            early.append(number)

    before = {number: signal.signal(number, pass_on) for number in handled()}
    try:
        # In a new session the subprocess receives signals from this process only, and so only once.
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            running.append(process)
            for number in early:
                process.send_signal(number)
            assert process.stderr is not None
            for sentence in process.stderr:
                if not passed or sentence.startswith("statefeed: "):  # not the traceback of interrupted imports
                    with suppress(OSError, ValueError):
                        sys.stderr.write(sentence)
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    caught = passed[-1] if passed else None
    if code == 0:
        return "finished", caught
    if code == 1 and "training diverged" in sentence:
        return "diverged", caught
    if passed or code > 128:
        raise Interrupted(f"the comparison was interrupted in {config.run.dir}: {_RESUME}", caught or code - 128)
    if code == 2 and sentence.startswith("statefeed: "):
        raise UsageError(sentence, reported=True)
    ended = f"whose training ended with exit code {code}"
    raise UsageError(f"the comparison stopped in {config.run.dir}, {ended}: {_RESUME}")


def show(compared: Sequence[Result], folder: Path, terms: Terms = DEFAULT_TERMS, wide: bool = False) -> None:
    """Print a table for every task and the verdicts, and leave the figures in the folder."""
    console = output.console()
    for title, same in tasks(compared).items():
        print_table(console, title, *(comparison(same) if wide else short_table(same)), (0,), wide)
    print_verdicts(compared, terms, wide)
    names = figures.save(figures.draw(compared, terms=terms), folder)
    console.print(
        f"{folder} keeps the runs, {COMPARISON}{''.join(f', {name}' for name in names)}; "
        f"statefeed report {folder} makes one page of it{'' if wide else ', --wide prints every column'}",
        soft_wrap=True,
    )
