"""Owns the recipe: every field is a dataclass field, a flag and a YAML key, and is checked once, here."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

T = TypeVar("T")

RECURRENT = ("rnn", "gru", "lstm")  # the cells that have a feedback rule


class UsageError(ValueError):
    """A mistake of the user's, told in one sentence; the command line turns it into exit code 2."""


def option(default: T, help: str) -> T:
    """A dataclass field with its default and the one line that documents it, here and in `--help`."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, expectation: str, got: object) -> None:
    """Refuse a value.

    Args:
        condition: whether the value is acceptable.
        expectation: what is expected, as the beginning of a sentence.
        got: the value.

    Raises:
        UsageError: when the condition does not hold.

    >>> require(1 > 2, "train.batch must be at least 1", 0)
    Traceback (most recent call last):
    statefeed.lm.config.UsageError: train.batch must be at least 1, got 0
    """
    if not condition:
        raise UsageError(f"{expectation}, got {got}")


@dataclass(frozen=True)
class Data:
    """What is read and into which tokens it is cut."""

    corpus: Literal["pydoc", "ptb", "wikitext", "text"] = option(
        "pydoc",
        "pydoc: the documentation that every Python carries; ptb: ptb.train.txt and ptb.valid.txt in the folder "
        "data.path; wikitext: wiki.train.tokens and wiki.valid.tokens there, or .raw; text: the file or folder there",
    )
    path: str | None = option(
        None,
        "for text a UTF-8 file, a folder of them, or a folder with train/valid/test files, each plain, .gz or .xz; for "
        "wikitext also hub:NAME, such as hub:wikitext-103-v1, to fetch it from the Hugging Face Hub",
    )
    tokens: Literal["char", "byte", "word", "bpe"] = option("bpe", "the unit that the model predicts")
    vocabulary: int | None = option(
        None, "number of types: for bpe null is 4096; for word null keeps every training word, rarer ones are <unk>"
    )
    eos: bool = option(True, "word tokens only: the end of each line is a token, <eos>")
    batches: Literal["stream", "blocks", "sentences"] = option(
        "stream",
        "stream: columns of continuous text, the state carried from step to step; blocks: shuffled pieces of "
        "train.context tokens; sentences: shuffled lines of words, each between <bos> and <eos>",
    )
    valid: float = option(0.05, "share of the text kept for validation where the corpus comes without splits")
    test: float = option(0.05, "share of the text kept for the test where the corpus comes without splits")

    def __post_init__(self) -> None:
        if self.corpus == "pydoc":
            require(self.path is None, "data.path belongs to the other corpora and pydoc reads no path", self.path)
        else:
            require(
                bool(self.path), f"data.path must name a file or folder when data.corpus is {self.corpus}", self.path
            )
        if self.tokens == "bpe":
            require(
                self.vocabulary is None or self.vocabulary > 256,
                "data.vocabulary must be at least 257 for bpe tokens, whose first 256 types are the bytes",
                self.vocabulary,
            )
        elif self.tokens == "word":
            require(
                self.vocabulary is None or self.vocabulary > 2,
                "data.vocabulary must be at least 3 for word tokens, since <unk> and <eos> are two of them",
                self.vocabulary,
            )
        else:
            require(
                self.vocabulary is None,
                "data.vocabulary is for word and bpe tokens only; "
                f"{self.tokens} tokens have as many types as they need",
                self.vocabulary,
            )
        require(
            self.batches != "sentences" or (self.tokens == "word" and self.eos),
            "data.batches=sentences needs data.tokens=word with data.eos=true, whose lines are its sentences",
            f"data.tokens={self.tokens} with data.eos={str(self.eos).lower()}",
        )
        require(0 < self.valid < 1, "data.valid must lie between 0 and 1, both excluded", self.valid)
        require(0 <= self.test < 1, "data.test must be at least 0 and below 1", self.test)
        require(
            self.valid + self.test < 1,
            "data.valid + data.test must leave text to train on and stay below 1",
            self.valid + self.test,
        )


@dataclass(frozen=True)
class Model:
    """Embedding, blocks around one sequence layer each, head."""

    cell: Literal["rnn", "gru", "lstm", "transformer", "s4d", "mingru"] = option(
        "gru", "the sequence layer; rnn is the tanh one; transformer, s4d and mingru have exact gradients alone"
    )
    feedback: float | str = option("dsf", "how gradients flow back through time: bptt, ft-bptt, dsf, gate+1, ...")
    layers: int = option(2, "number of blocks")
    width: int = option(256, "units of the embedding, of every state and of every block")
    block: Literal["plain", "prenorm", "stacked"] = option(
        "plain",
        "plain: x + rnn(x); prenorm: x + linear(rnn(norm(x))), then x + mlp(norm(x)); stacked: rnn(x)",
    )
    dropout: float = option(0.0, "share of units zeroed after the embedding and after every sub-layer")
    uniform: float | None = option(None, "initial weights uniform up to this; null for the usual ones of each layer")
    heads: int = option(8, "transformer only: attention heads")
    window: int = option(256, "transformer only: how many tokens a token sees, itself included")
    modes: int = option(16, "s4d only: complex modes of every unit")

    def __post_init__(self) -> None:
        require(self.layers >= 1, "model.layers must be at least 1", self.layers)
        require(self.width >= 1, "model.width must be at least 1", self.width)
        require(0 <= self.dropout < 1, "model.dropout must be at least 0 and below 1", self.dropout)
        require(
            self.cell in RECURRENT or self.feedback == "bptt",
            f"model.feedback must be bptt where model.cell is {self.cell}, whose gradient is always exact",
            self.feedback,
        )
        require(
            self.uniform is None or 0 < self.uniform < float("inf"),
            "model.uniform must be a positive number, or null",
            self.uniform,
        )
        if self.cell == "transformer":
            require(self.heads >= 1, "model.heads must be at least 1", self.heads)
            require(
                self.width % (2 * self.heads) == 0,
                f"model.width must be a multiple of twice model.heads, {2 * self.heads}",
                self.width,
            )
        require(self.window >= 1, "model.window must be at least 1", self.window)
        require(self.modes >= 1, "model.modes must be at least 1", self.modes)


@dataclass(frozen=True)
class Train:
    """How long, on how much text at once, and by which steps."""

    epochs: int = option(1, "passes over the training split")
    steps: int | None = option(None, "optimizer steps; when given it decides instead of train.epochs")
    seed: int = option(1, "of the initial weights, the order of the text, dropout and the sample")
    batch: int = option(32, "sequences read side by side in one step, by all processes together")
    accumulate: int = option(1, "parts in which a process takes its sequences, one after the other: less memory")
    eval_batch: int | None = option(None, "sequences scored side by side; null for train.batch")
    context: int = option(64, "tokens of each sequence in one step; the state is carried on to the next step")
    restart: float = option(0.05, "share of the sequences that begin each step without a past, as any new text does")
    loss: Literal["mean", "window"] = option(
        "mean", "what is minimised: nats per token, or nats summed over the tokens of a sequence, mean over sequences"
    )
    precision: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "of the products in training, weights and scores being float32; the others are torch's autocast, float16 with "
        "a scaled loss and on a GPU only",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where it runs; auto is cuda where there is one, else cpu")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp",
        "what each process of torchrun holds: ddp all weights; fsdp its part of weights, gradients and optimizer state",
    )
    compile: Literal["default", "reduce-overhead"] | None = option(
        None,
        "mode of torch.compile for the blocks in training; reduce-overhead replays CUDA graphs where shapes stay the "
        "same; null leaves them as they are",
    )
    optimizer: Literal["adam", "sgd"] = option("adam", "adam with betas 0.9 and 0.999, or plain gradient descent")
    lr: float = option(3e-3, "largest learning rate")
    weight_decay: float = option(0.0, "L2 penalty, added to the gradient")
    warmup: float = option(50.0, "steps over which the learning rate rises to train.lr; below 1 the share of all steps")
    schedule: Literal["constant", "linear", "cosine", "steps"] = option(
        "cosine",
        "the learning rate after warmup: stays, falls to train.floor right behind the last step, or is multiplied by "
        "train.decay after train.decay_after epochs and every train.decay_every from there",
    )
    floor: float = option(0.0, "linear and cosine: share of train.lr that is left at the end")
    decay: float = option(0.1, "steps: what the learning rate is multiplied by")
    decay_after: int = option(10, "steps: epochs before the first time")
    decay_every: int = option(10, "steps: epochs from one time to the next")
    clip: float | None = option(1.0, "largest norm of the gradient of all weights together; null for no limit")
    evaluations: int = option(10, "how often the validation split is scored, evenly spread, last at the end")
    alignment: bool = option(
        False, "at every evaluation log how the gradient of the first training batch agrees with exact BPTT"
    )

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "train.epochs must be at least 1", self.epochs)
        require(self.steps is None or self.steps >= 1, "train.steps must be at least 1", self.steps)
        require(0 <= self.seed < 2**63, "train.seed must be at least 0 and below 2^63", self.seed)
        require(self.batch >= 1, "train.batch must be at least 1", self.batch)
        require(
            1 <= self.accumulate <= self.batch, "train.accumulate must lie between 1 and train.batch", self.accumulate
        )
        require(self.eval_batch is None or self.eval_batch >= 1, "train.eval_batch must be at least 1", self.eval_batch)
        require(self.context >= 1, "train.context must be at least 1", self.context)
        require(0 <= self.restart <= 1, "train.restart must lie between 0 and 1", self.restart)
        require(0 < self.lr < float("inf"), "train.lr must be a positive number", self.lr)
        require(0 <= self.weight_decay < float("inf"), "train.weight_decay must be at least 0", self.weight_decay)
        require(
            self.warmup >= 0 and (self.warmup < 1 or self.warmup == int(self.warmup)),
            "train.warmup must be a number of steps, or a share of them from 0 and below 1",
            self.warmup,
        )
        require(0 <= self.floor <= 1, "train.floor must lie between 0 and 1", self.floor)
        require(0 < self.decay <= 1, "train.decay must be above 0 and at most 1", self.decay)
        require(self.decay_after >= 1, "train.decay_after must be at least 1", self.decay_after)
        require(self.decay_every >= 1, "train.decay_every must be at least 1", self.decay_every)
        require(self.clip is None or self.clip > 0, "train.clip must be positive, or null for no limit", self.clip)
        require(self.evaluations >= 1, "train.evaluations must be at least 1", self.evaluations)
        require(
            self.parallel == "ddp" or not self.alignment,
            "train.alignment compares gradients of whole weights: train.parallel must be ddp",
            self.parallel,
        )


@dataclass(frozen=True)
class Run:
    """Where the run is kept, and how."""

    dir: str = option("runs/default", "folder that is made for the run; one that holds a run needs --resume")
    checkpoint_minutes: float = option(
        10.0, "time between checkpoints, 0 for one after every step; one more is made at the end"
    )
    checkpoints: int = option(2, "how many checkpoints are kept, the last ones")
    tensorboard: bool = option(False, "write the metrics for TensorBoard too, into the folder of the run")

    def __post_init__(self) -> None:
        require(bool(self.dir), "run.dir must name a folder", repr(self.dir))
        require(self.checkpoint_minutes >= 0, "run.checkpoint_minutes must be at least 0", self.checkpoint_minutes)
        require(self.checkpoints >= 1, "run.checkpoints must be at least 1", self.checkpoints)


SECTIONS: dict[str, type] = {"data": Data, "model": Model, "train": Train, "run": Run}


@dataclass(frozen=True)
class Config:
    """A whole recipe.

    >>> Config().model.feedback
    'dsf'
    >>> print(Config(train=Train(steps=7)).to_yaml().split("train:")[1].splitlines()[2])
      steps: 7
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    run: Run = field(default_factory=Run)

    def to_yaml(self) -> str:
        """The recipe with every key, as text that `parse` reads back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def parser(prog: str) -> ArgumentParser:
    """A parser with one flag for every field of every section.

    Args:
        prog: how the command calls itself in its usage line.
    """
    flags = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, print_config=None)
    for section, kind in SECTIONS.items():
        hints = get_type_hints(kind)
        group = flags.add_argument_group(section, kind.__doc__)
        for item in dataclasses.fields(kind):
            group.add_argument(
                f"--{section}.{item.name}", type=hints[item.name], default=item.default, help=item.metadata["help"]
            )
    return flags


def parse(flags: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """What `flags` makes of the arguments.

    Raises:
        UsageError: for an unknown flag, a missing value or a value of the wrong type.
    """
    try:
        return flags.parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(_sentence(str(error), list(flags.get_defaults().keys()))) from error


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in a mapping is an error, as its standard has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            raise yaml.YAMLError(f"the key {twice[0]} stands twice in one mapping")
        return super().construct_mapping(node, deep)


def recipe_flags(path: str | Path) -> list[str]:
    """A recipe as the flags that say the same, so that flags after them override it.

    Args:
        path: a YAML file of sections, each a mapping of keys to values.

    Raises:
        UsageError: when the file is missing or a folder, is not YAML, has a key twice, or is not made of sections.
    """
    try:
        sections = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UsageError(f"the recipe {path} does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"the recipe {path} must be a YAML file, got a folder") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the recipe {path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict):
        raise UsageError(f"the recipe {path} must hold sections ({', '.join(SECTIONS)}), got {sections!r}")
    flags = []
    for section, keys in sections.items():
        if section not in SECTIONS:
            raise UsageError(f"unknown section {section!r} in {path}: expected one of {', '.join(SECTIONS)}")
        if not isinstance(keys, dict):
            raise UsageError(f"section {section!r} of {path} must hold keys and values, got {keys!r}")
        flags += [f"--{section}.{key}={'null' if value is None else value}" for key, value in keys.items()]
    return flags


def build(values: Namespace) -> Config:
    """The configuration that parsed flags describe.

    Raises:
        UsageError: when a value is out of range.
    """
    return Config(**{section: kind(**vars(values[section])) for section, kind in SECTIONS.items()})


def load(path: Path) -> Config:
    """The configuration written in a YAML file.

    Raises:
        UsageError: when it is missing or wrong.
    """
    return build(parse(parser("statefeed"), recipe_flags(path)))


def _sentence(message: str, known: Sequence[str]) -> str:
    """What jsonargparse reports on several lines, as one sentence.

    Args:
        message: its report.
        known: the keys there are.
    """
    if unknown := re.match(r"unrecognized arguments: --([^\s=]+)", message):
        near = difflib.get_close_matches(unknown[1], known, n=1)
        return f"unknown key {unknown[1]}" + (f": did you mean {near[0]}?" if near else "; --help lists every key")
    names = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
    if wrong := re.match(r'Parser key "(.+?)":', message):
        choices = re.findall(r"Literal\[(.*?)\]", message)[:1] or [
            names.get(kind, kind) for kind in dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message))
        ]
        got = re.findall(r"(?:Got|Given) value: (.*)", message)
        return f"{wrong[1]} must be {' or '.join(choices)}, got {got[-1]}"
    return " ".join(message.split())
