"""The command `statefeed report`: runs, comparisons and benchmarks on one page."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from statefeed.lm import recipe
from statefeed.lm.compare import figures, markdown, page
from statefeed.lm.compare.sources import read
from statefeed.lm.errors import require

_READ = (".jsonl", ".json", ".yaml", ".safetensors")  # suffixes of files of runs, comparisons and benchmarks


def command(arguments: Sequence[str]) -> None:
    """Run `statefeed report`.

    Args:
        arguments: the words after the command.

    Raises:
        UsageError: the arguments are invalid, or a path holds nothing to report.
    """
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
    values = recipe.parse(flags, arguments)
    output = recipe.expand(values.markdown or values.summary or values.output)
    folder = None if values.figures is None else recipe.expand(values.figures)
    paths = [recipe.expand(path) for path in values.paths]
    require(output.parent.is_dir(), "the page must be in an existing folder", output)
    require(
        output.suffix not in _READ and all(output.resolve() != path.resolve() for path in paths),
        f"the page must not replace an input file or have the suffix {', '.join(_READ)}",
        output,
    )
    require(folder is None or folder.is_dir() or not folder.exists(), "--figures must name a folder", folder)
    found = read(paths)
    if values.markdown is not None:
        output.write_text(markdown.page(found), encoding="utf-8")
    elif values.summary is not None:
        markdown.update_summary(output, found)
    else:
        page.write(found, output)
    written = [f"{output}: {len(found.results)} runs, {len(found.benchmarks)} records of benchmarks"]
    if folder is not None:
        written += figures.save(figures.draw(found.results), folder)
    print("\n".join(written))
