"""The commands: each parses its arguments without torch, and returns the work that is left to do."""

import dataclasses
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from jsonargparse import ArgumentParser

from statefeed.lm import recipe as recipes
from statefeed.lm import shipped
from statefeed.lm.config import Config, Data
from statefeed.lm.data import corpora
from statefeed.lm.errors import UsageError, require
from statefeed.lm.run.files import CONFIG, METRICS

Work: TypeAlias = Callable[[], None]


def train(arguments: Sequence[str]) -> Work | None:
    """`statefeed train`; None where the recipe was only printed."""
    flags = recipes.parser("statefeed train")
    flags.add_argument(
        "recipe", nargs="?", help="YAML file of these keys; flags override it; with --resume it may be a run folder"
    )
    flags.add_argument("--resume", action="store_true", help="resume the run in run.dir, bit for bit")
    flags.add_argument(
        "--again",
        action="store_true",
        help="resume the run in run.dir if it is unfinished; where it has ended, start run.dir-2, run.dir-3, ...",
    )
    flags.add_argument("--brief", action="store_true", help="end without a sample and the next commands")
    flags.add_argument("--print_config", action="store_true", help="print the whole recipe as it would run, and stop")
    values = recipes.parse(flags, arguments)
    require(not (values.resume and values.again), "--resume and --again exclude each other", "both")
    path = None if values.recipe is None else recipes.expand(values.recipe)
    if values.resume and (path is None or path.is_dir()):
        folder = path or recipes.expand(values.run.dir)
        if not (folder / CONFIG).is_file():
            raise UsageError(f"{folder} holds no run to resume: name its folder, or the recipe to begin with")
        named = [word for word in arguments if re.match(r"--run\.dir\b", word)]
        if path is not None and named and recipes.expand(values.run.dir).resolve() != path.resolve():
            raise UsageError(
                f"--resume {path} names the folder of the run, and --run.dir another, {values.run.dir}: give one"
            )
        # The folder may have been moved since.
        values = recipes.parse(flags, [*arguments, f"--run.dir={folder}"], folder / CONFIG)
    elif path is not None:
        if values.resume and not path.exists():
            raise UsageError(f"there is no run folder or recipe {path} to resume")
        if (path / CONFIG).is_file():
            raise UsageError(f"{path} is the folder of a run: resume it with --resume")
        values = recipes.parse(flags, arguments, path)
    config = recipes.build(values)
    if values.print_config:
        print(config.to_yaml(getattr(sys.stdout, "encoding", None) or "utf-8"), end="")
        return None

    def work() -> None:
        from statefeed.lm.run.train import train

        recipe, resumed = _again(config) if values.again else (config, values.resume)
        train(recipe, resumed, values.brief)

    return work


def _again(config: Config) -> tuple[Config, bool]:
    """The recipe with the folder of its unfinished run or of a new one, and whether it is resumed."""
    from statefeed.lm.compare.run_result import read_run
    from statefeed.lm.run.again import again

    def unfinished(folder: Path) -> bool:
        return not (folder / METRICS).exists() or read_run(folder).outcome == "unfinished"

    config, resumed, why = again(config, unfinished)
    if why is not None:
        print(why, flush=True)
    return config, resumed


def _run_parser(command: str) -> ArgumentParser:
    flags = ArgumentParser(prog=f"statefeed {command}", exit_on_error=False, allow_abbrev=False)
    flags.add_argument("run", help="run folder that `statefeed train` left")
    flags.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where it runs")
    return flags


def evaluate(arguments: Sequence[str]) -> Work:
    """`statefeed evaluate`."""
    flags = _run_parser("evaluate")
    splits = Literal["train", "valid", "test", "all"]
    flags.add_argument("--split", type=splits, default="valid", help="what to score; all: the splits as one text")
    flags.add_argument(
        "--data.path",
        type=str | None,
        default=None,
        help="where the text of the run is now, or another text to score; null for where it was in training",
    )
    values = recipes.parse(flags, arguments)

    def work() -> None:
        from statefeed.lm.data import batches, cache
        from statefeed.lm.run import folder
        from statefeed.lm.run.device import resolve_device
        from statefeed.lm.run.evaluate import score

        device = resolve_device(values.device, "--device")
        run = folder.load(recipes.expand(values.run))
        corpus = corpora.read(_data(run.config.data, values.data.path))
        if values.split not in ("all", *corpus.splits):
            raise UsageError(f"{corpus.name} has no {values.split} split, only {' and '.join(corpus.splits)}")
        chosen = [split for split in corpus.splits if values.split in (split, "all")]
        what = values.split
        for split in chosen:
            recorded = run.metadata["splits"].get(split, {}).get("sha256")
            if recorded in (None, corpus.digests[split]):
                continue
            if values.data.path is None:
                raise UsageError(
                    f"the {split} split of {corpus.name} is not the text of the run: expected sha256 {recorded}, got "
                    f"{corpus.digests[split]}; name the text to score with --data.path"
                )
            what = f"{values.split} of {corpus.name}, another text than the run's"
        ids = cache.encode(run.tokenizer, "".join(corpus.splits[split] for split in chosen))
        source = batches.scoring(ids, run.config.data, run.config.train)
        print(f"{what}: {score(run.model.to(device), source, sum(corpus.sizes[split] for split in chosen))}")

    return work


def _data(data: Data, path: str | None) -> Data:
    """How a run reads text, of another path where one is given."""
    if path is None:
        return data
    corpus = "text" if data.corpus == "pydoc" else data.corpus
    return dataclasses.replace(data, corpus=corpus, path=path)


def generate(arguments: Sequence[str]) -> Work:
    """`statefeed generate`."""
    flags = _run_parser("generate")
    flags.add_argument("--prompt", type=str, default=None, help="text to continue; by default the end of a line")
    flags.add_argument("--tokens", type=int, default=200, help="how many tokens to add")
    flags.add_argument("--temperature", type=float, default=1.0, help="lower: more deterministic; higher: more diverse")
    flags.add_argument(
        "--top-k", "--top_k", type=int | None, default=None, help="sample from the k likeliest tokens only"
    )
    flags.add_argument(
        "--top-p", "--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability"
    )
    flags.add_argument("--seed", type=int, default=1, help="the same seed gives the same text")
    values = recipes.parse(flags, arguments)
    require(values.tokens >= 1, "--tokens must be at least 1", values.tokens)
    require(0 < values.temperature < float("inf"), "--temperature must be positive", values.temperature)
    require(values.top_k is None or values.top_k >= 1, "--top-k must be at least 1", values.top_k)
    require(0 < values.top_p <= 1, "--top-p must be above 0 and at most 1", values.top_p)
    require(0 <= values.seed < 2**63, "--seed must be at least 0 and below 2^63", values.seed)

    def work() -> None:
        from statefeed.lm.run import folder
        from statefeed.lm.run.device import resolve_device
        from statefeed.lm.run.generate import generate

        device = resolve_device(values.device, "--device")
        run = folder.load(recipes.expand(values.run))
        prompt = run.tokenizer.start if values.prompt is None else values.prompt
        outside = run.tokenizer.unknown(prompt)
        if outside is not None:
            kind = run.config.data.tokens
            raise UsageError(
                f"--prompt: {outside!r} is not among the {run.tokenizer.size:,} {kind} tokens of {values.run}"
            )
        ids = [int(i) for i in run.tokenizer.encode(prompt)]
        require(bool(ids), "--prompt must hold at least one token", repr(prompt))
        following = generate(
            run.model.to(device),
            ids,
            temperature=values.temperature,
            top_k=values.top_k,
            top_p=values.top_p,
            seed=values.seed,
            sentence=run.tokenizer.sentence,
        )
        ids += [next(following) for _ in range(values.tokens)]
        print(run.tokenizer.decode(ids))

    return work


def list_corpora(arguments: Sequence[str]) -> Work | None:
    """`statefeed corpora`; None where the corpora were only listed."""
    if not arguments:
        for name, what in corpora.KINDS.items():
            print(textwrap.fill(what, 100, initial_indent=f"{name:10}", subsequent_indent=10 * " "))
        print("\nFiles may be plain, .gz or .xz. `statefeed corpora --data.corpus=ptb --data.path=FOLDER` reads one.")
        return None
    flags = recipes.parser("statefeed corpora")
    flags.add_argument("recipe", nargs="?", help="YAML file of these keys, of which data counts; flags override it")
    values = recipes.parse(flags, arguments)
    values = recipes.parse(flags, arguments, values.recipe)
    data = recipes.build(values).data

    def work() -> None:
        from statefeed.lm.data import cache

        corpus = corpora.read(data)
        tokenizer = cache.tokenizer(data, corpus.splits)
        print(f"{corpus.name}: {tokenizer.size:,} types of {data.tokens} tokens")
        print(f"{'split':5}  {'bytes':>13}  {'tokens':>13}  sha256")
        for split, text in corpus.splits.items():
            amounts = f"{corpus.sizes[split]:13,}  {len(cache.encode(tokenizer, text)):13,}"
            print(f"{split:5}  {amounts}  {corpus.digests[split]}")

    return work


def copy_recipes(arguments: Sequence[str]) -> None:
    """`statefeed recipes`: list the recipes that come with the package, or copy those named."""
    flags = ArgumentParser(prog="statefeed recipes", exit_on_error=False, allow_abbrev=False)
    flags.add_argument("names", nargs="*", help="recipes to copy, with the base files they need; all: every one")
    flags.add_argument("--out", type=str, default="recipes", help="folder of the copies")
    values = recipes.parse(flags, arguments)
    if not values.names:
        known = shipped.titles()
        width = max(map(len, known))
        for name, title in known.items():
            print(f"{name:{width}}  {title}")
        print("\n`statefeed recipes NAME...` copies them into the folder recipes, `statefeed recipes all` every one.")
        return
    target = recipes.expand(values.out)
    for path in shipped.copy(values.names, target):
        print(path)
    name = "quickstart" if "all" in values.names else values.names[0].removesuffix(".yaml")
    print(f"next: statefeed train {shlex.quote(str(target / f'{name}.yaml'))}")
