"""Recipes: every field is a dataclass field, a flag and a YAML key, and is checked here, once."""

import codecs
import dataclasses
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

import yaml

from statefeed.lm.errors import UsageError as UsageError
from statefeed.lm.errors import require

T = TypeVar("T")
Identity: TypeAlias = Literal["task", "run", "place"]

RECURRENT = ("rnn", "gru", "lstm")  # the cells that have a feedback rule


def option(default: T, help: str, identity: Identity = "task") -> T:
    """A field of a recipe.

    Args:
        default: its value where a recipe does not name it.
        help: the one line that documents it, here and in `--help`.
        identity: what the field says about a run: it defines the task; it varies between compared runs; it says in
            which place or how the run is computed and saved (`statefeed.lm.identity`).
    """
    return field(default=default, metadata={"help": help, "identity": identity})


@dataclass(frozen=True)
class Data:
    """The text and its tokens."""

    corpus: Literal["pydoc", "ptb", "wikitext", "text"] = option(
        "pydoc",
        "pydoc: the documentation inside every Python; ptb: ptb.train.txt and ptb.valid.txt in the folder "
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
        "stream: columns of continuous text, the state passed from step to step; blocks: shuffled segments of "
        "train.context tokens; sentences: shuffled lines of words, each between <bos> and <eos>",
    )
    valid: float = option(0.05, "share of the text held out for validation where the corpus comes without splits")
    test: float = option(0.05, "share of the text held out for the test where the corpus comes without splits")

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
        require(0 < self.valid < 1, "data.valid must be between 0 and 1, both excluded", self.valid)
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
    feedback: float | str = option(
        "dsf", "how gradients flow back through time: bptt (exact), ft-bptt, dsf, gate+1, ...", identity="run"
    )
    forward: str = option(
        "sequential",
        "sequential; newton or newton(tolerance): recurrent layers run forward in parallel over time, to a tolerance",
        identity="run",
    )
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
            self.cell in RECURRENT or self.forward == "sequential",
            f"model.forward must be sequential where model.cell is {self.cell}, which has no recurrent layer",
            self.forward,
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
    seed: int = option(1, "of the initial weights, the order of the text, dropout and the sample", identity="run")
    batch: int = option(32, "sequences read side by side in one step, by all processes together")
    accumulate: int = option(1, "parts in which a process takes its sequences, one after the other: less memory")
    eval_batch: int | None = option(None, "sequences scored side by side; null for train.batch")
    context: int = option(64, "tokens of each sequence in one step; the state is passed to the next step")
    state_reset_prob: float = option(
        0.05, "share of the sequences whose state is reset before each step, as at the beginning of a new text"
    )
    loss: Literal["mean", "window"] = option(
        "mean", "what is minimized: nats per token, or nats summed over the tokens of a sequence, mean over sequences"
    )
    precision: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "of the products in training, weights and scores being float32; the others are torch's autocast, float16 with "
        "a scaled loss and on a GPU only",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "where it runs; auto is cuda where there is one, else cpu", identity="place"
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp",
        "what each process of torchrun holds: ddp all weights; fsdp its part of weights, gradients and optimizer state",
        identity="place",
    )
    compile: Literal["default", "reduce-overhead"] | None = option(
        None,
        "mode of torch.compile for the blocks in training; reduce-overhead replays CUDA graphs where shapes stay the "
        "same; null leaves them as they are",
        identity="place",
    )
    optimizer: Literal["adam", "sgd"] = option("adam", "adam with betas 0.9 and 0.999, or plain gradient descent")
    lr: float = option(3e-3, "largest learning rate", identity="run")
    weight_decay: float = option(0.0, "L2 penalty, added to the gradient")
    warmup: float = option(50.0, "steps over which the learning rate rises to train.lr; below 1 the share of all steps")
    schedule: Literal["constant", "linear", "cosine", "steps"] = option(
        "cosine",
        "the learning rate after warmup: stays, falls to train.floor right after the last step, or is multiplied by "
        "train.decay after train.decay_after epochs and every train.decay_every from there",
    )
    floor: float = option(0.0, "linear and cosine: share of train.lr that is left at the end")
    decay: float = option(0.1, "steps: what the learning rate is multiplied by")
    decay_after: int = option(10, "steps: epochs before the first time")
    decay_every: int = option(10, "steps: epochs from one time to the next")
    clip: float | None = option(1.0, "largest norm of the gradient of all weights together; null for no limit")
    evaluations: int = option(10, "how often the validation split is scored, evenly spread, last at the end")
    alignment: bool = option(
        False,
        "at every evaluation log how the gradient of the first training batch agrees with exact BPTT",
        identity="run",
    )

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "train.epochs must be at least 1", self.epochs)
        require(self.steps is None or self.steps >= 1, "train.steps must be at least 1", self.steps)
        require(0 <= self.seed < 2**63, "train.seed must be at least 0 and below 2^63", self.seed)
        require(self.batch >= 1, "train.batch must be at least 1", self.batch)
        require(
            1 <= self.accumulate <= self.batch, "train.accumulate must be between 1 and train.batch", self.accumulate
        )
        require(self.eval_batch is None or self.eval_batch >= 1, "train.eval_batch must be at least 1", self.eval_batch)
        require(self.context >= 1, "train.context must be at least 1", self.context)
        require(
            0 <= self.state_reset_prob <= 1, "train.state_reset_prob must be between 0 and 1", self.state_reset_prob
        )
        require(0 < self.lr < float("inf"), "train.lr must be a positive number", self.lr)
        require(0 <= self.weight_decay < float("inf"), "train.weight_decay must be at least 0", self.weight_decay)
        require(
            self.warmup >= 0 and (self.warmup < 1 or self.warmup == int(self.warmup)),
            "train.warmup must be a number of steps, or a share of them from 0 and below 1",
            self.warmup,
        )
        require(0 <= self.floor <= 1, "train.floor must be between 0 and 1", self.floor)
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
    """Where and how the run is saved."""

    dir: str = option(
        "runs/default", "folder that is made for the run; one that holds a run needs --resume", identity="place"
    )
    checkpoint_minutes: float = option(
        10.0, "time between checkpoints, 0 for one after every step; one more is made at the end", identity="place"
    )
    checkpoints: int = option(2, "how many checkpoints are kept, the last ones", identity="place")
    tensorboard: bool = option(
        False, "write the metrics for TensorBoard too, into the folder of the run", identity="place"
    )

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

    def __post_init__(self) -> None:
        require(
            self.model.forward == "sequential" or self.train.compile is None,
            "train.compile must be null unless model.forward is sequential",
            self.train.compile,
        )

    def to_yaml(self, encoding: str = "utf-8") -> str:
        """The recipe with every key, as text that `parse` reads back.

        Args:
            encoding: that the text will be written in. Recipes are read as UTF-8, so that other ones get ASCII.
        """
        utf8 = codecs.lookup(encoding).name == "utf-8"
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=utf8)
