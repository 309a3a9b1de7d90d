"""The commands `statefeed compare` and `statefeed report`: their arguments, which are parsed without torch."""

import re
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from statefeed.lm import recipe as recipes
from statefeed.lm.errors import UsageError, require

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
    for argument in arguments:
        if re.match(r"--(model\.feedback|run\.dir)\b", argument):
            raise UsageError(f"statefeed compare takes --feedback and --out, got {argument}")
    values = recipes.parse(flags, arguments)
    values = recipes.parse(flags, arguments, values.recipe)
    config = recipes.build(values)
    folder = recipes.expand(values.out or f"{config.run.dir}-compare")

    def work() -> None:
        from statefeed.lm.compare.compare import compare
        from statefeed.lm.compare.plan import plan
        from statefeed.lm.compare.sources import COMPARISON
        from statefeed.lm.run.folder import check_apart

        planned = plan(config, values.feedback, values.seeds, values.lr, folder)
        check_apart(config.data, folder, [COMPARISON])
        compare(planned, folder, values.wide)

    return work


def report(arguments: Sequence[str]) -> Callable[[], None]:
    """`statefeed report`; returns the work that is left to do."""
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
    values = recipes.parse(flags, arguments)
    output = recipes.expand(values.markdown or values.summary or values.output)
    folder = None if values.figures is None else recipes.expand(values.figures)
    paths = [recipes.expand(path) for path in values.paths]
    require(output.parent.is_dir(), "the page must be in an existing folder", output)
    require(
        output.suffix not in _REPORTED and all(output.resolve() != path.resolve() for path in paths),
        f"the page must not replace an input file or have the suffix {', '.join(_REPORTED)}",
        output,
    )
    require(folder is None or folder.is_dir() or not folder.exists(), "--figures must name a folder", folder)

    def work() -> None:
        from statefeed.lm.compare import figures, markdown, page, summary
        from statefeed.lm.compare.measurements import step_times
        from statefeed.lm.compare.sources import read

        found = read(paths)
        if values.markdown is not None:
            output.write_text(markdown.page(found), encoding="utf-8")
        elif values.summary is not None:
            summary.update_summary(output, found)
        else:
            page.write(found, output)
        written = [f"{output}: {len(found.results)} runs, {len(found.benchmarks)} records of benchmarks"]
        if folder is not None:
            written += figures.save(figures.draw(found.results, step_times(found)), folder)
        print("\n".join(written))

    return work
