"""The commands `statefeed compare` and `statefeed report`: their arguments, which are parsed without torch."""

import re
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from statefeed.lm import recipe as recipes
from statefeed.lm.atomic_file import write_output
from statefeed.lm.errors import UsageError, require

_BASELINE = "the rule that others are compared with over paired seeds"
_WITHIN = (
    "percent: verdicts on the claim that a rule's perplexity is at most this much above the baseline's; by default "
    "rules are called better or worse"
)
_REPORTED = (".jsonl", ".json", ".yaml", ".safetensors")  # the endings of runs, comparisons and benchmarks


def compare(arguments: Sequence[str]) -> Callable[[], None]:
    """`statefeed compare`; returns the work that is left to do."""
    flags = recipes.parser("statefeed compare")
    flags.add_argument("recipe", nargs="?", help="YAML file of these keys; flags override it")
    flags.add_argument("--feedback", type=str, required=True, help="rules or schedules of them, separated by commas")
    flags.add_argument("--seeds", type=int, default=1, help="runs of every rule: train.seed and those after it")
    flags.add_argument(
        "--lr", type=str, default="", help="learning rates of single rules, as dsf=2e-3,bptt=1e-3; others: train.lr"
    )
    flags.add_argument(
        "--out", type=str, default=None, help="folder of the comparison; null is run.dir followed by -compare"
    )
    flags.add_argument("--wide", action="store_true", help="print every column, and not only what 80 characters hold")
    flags.add_argument("--baseline", type=str, default="bptt", help=_BASELINE)
    flags.add_argument("--within", type=float | None, default=None, help=_WITHIN)
    for argument in arguments:
        if re.match(r"--(model\.feedback|run\.dir)\b", argument):
            raise UsageError(f"statefeed compare takes --feedback and --out, got {argument}")
    values = recipes.parse(flags, arguments)
    values = recipes.parse(flags, arguments, values.recipe)
    config = recipes.build(values)
    require(
        config.train.alignment or not any(re.match(r"--train\.alignment\b", word) for word in arguments),
        "statefeed compare measures the alignment of every run: train.alignment must be true, or left out",
        "false",
    )
    folder = recipes.expand(values.out) if values.out else recipes.beside(config.run.dir, "-compare")
    _check_within(values.within)

    def work() -> None:
        from statefeed.lm.compare.compare import compare
        from statefeed.lm.compare.plan import plan
        from statefeed.lm.compare.sources import COMPARISON
        from statefeed.lm.compare.verdicts import terms
        from statefeed.lm.run.distributed import job_size
        from statefeed.lm.run.folder import check_apart

        require(
            job_size() == 1, "statefeed compare starts its runs itself: start it without torchrun", "several processes"
        )
        planned = plan(config, values.feedback, values.seeds, values.lr, folder)
        asked = terms(values.baseline, values.within)
        check_apart(config.data, folder, [COMPARISON])
        compare(planned, folder, asked, values.wide)

    return work


def _report_parser() -> ArgumentParser:
    flags = ArgumentParser(prog="statefeed report", exit_on_error=False, allow_abbrev=False)
    flags.add_argument(
        "paths",
        nargs="+",
        help="run folders, comparison folders, folders of these, JSONL files of a comparison or bench",
    )
    flags.add_argument(
        "-o", "--output", type=str, default="report.html", help="path of the page; an existing file is replaced"
    )
    flags.add_argument("--figures", type=str | None, default=None, help="folder for the figures as SVG files")
    flags.add_argument(
        "--markdown", type=str | None, default=None, help="write tables into this Markdown file instead of the page"
    )
    flags.add_argument(
        "--summary", type=str | None, default=None, help="update the figures in this Markdown file instead of the page"
    )
    flags.add_argument(
        "--verdicts",
        type=str | None,
        default=None,
        help="update the verdicts in this Markdown file instead of the page",
    )
    flags.add_argument("--records", type=str | None, default=None, help="write the runs into this new JSONL file, too")
    flags.add_argument("--baseline", type=str, default="bptt", help=_BASELINE)
    flags.add_argument("--within", type=float | None, default=None, help=_WITHIN)
    return flags


def report(arguments: Sequence[str]) -> Callable[[], None]:
    """`statefeed report`; returns the work that is left to do."""
    values = recipes.parse(_report_parser(), arguments)
    pages = [f"--{name}" for name in ("markdown", "summary", "verdicts") if getattr(values, name) is not None]
    require(len(pages) <= 1, "only one of --markdown, --summary and --verdicts may be given", " and ".join(pages))
    _check_within(values.within)
    output = recipes.expand(values.markdown or values.summary or values.verdicts or values.output)
    folder = None if values.figures is None else recipes.expand(values.figures)
    paths = [recipes.expand(path) for path in values.paths]
    require(output.parent.is_dir(), "the page must be in an existing folder", output)
    require(
        output.suffix not in _REPORTED and all(output.resolve() != path.resolve() for path in paths),
        f"the page must not replace an input file or have the suffix {', '.join(_REPORTED)}",
        output,
    )
    records = None if values.records is None else recipes.expand(values.records)
    require(
        records is None or (records.suffix == ".jsonl" and records.parent.is_dir() and not records.exists()),
        "--records must name a new .jsonl file in an existing folder",
        records,
    )
    require(folder is None or folder.is_dir() or not folder.exists(), "--figures must name a folder", folder)

    def work() -> None:
        from statefeed.lm.compare import figures, markdown, page, summary, terminal
        from statefeed.lm.compare.measurements import step_times
        from statefeed.lm.compare.results import to_line
        from statefeed.lm.compare.sources import read
        from statefeed.lm.compare.verdicts import terms

        found, asked = read(paths), terms(values.baseline, values.within)
        if values.markdown is not None:
            write_output(output, markdown.page(found))
        elif values.summary is not None:
            summary.update_summary(output, found)
        elif values.verdicts is not None:
            summary.update_verdicts(output, found, asked)
        else:
            page.write(found, output, asked)
            terminal.print_verdicts(found.results, asked)
        written = [f"{output}: {len(found.results)} runs, {len(found.benchmarks)} records of benchmarks"]
        if folder is not None:
            written += figures.save(figures.draw(found.results, step_times(found)), folder)
        if records is not None:
            write_output(records, "".join(map(to_line, found.results)))
            written.append(str(records))
        print("\n".join(written))

    return work


def _check_within(percent: float | None) -> None:
    require(percent is None or 0 <= percent < 1000, "--within must be a number of percent from 0 to 1,000", percent)
