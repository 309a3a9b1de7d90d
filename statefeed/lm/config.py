"""Recipe options: every option is a dataclass field, a command-line flag and a YAML key, validated here."""

import codecs
import dataclasses
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

import yaml

from statefeed.lm.errors import UsageError as UsageError
from statefeed.lm.errors import require

T = TypeVar("T")
Identity: TypeAlias = Literal["task", "run", "place"]

RECURRENT = ["rnn", "gru", "lstm", "slstm"]  # the cells that have a feedback rule


def option(default: T, help: str, identity: Identity = "task") -> T:
    """Define an option of a recipe.

    Args:
        default: value if a recipe does not set the option.
        help: one-line description, also shown by `--help`.
        identity: meaning for the identity of a run (`statefeed.lm.identity`): part of the task, varied between compared
            runs, or the place where the run is computed and saved.
    """
    return field(default=default, metadata={"help": help, "identity": identity})


@dataclass(frozen=True)
class Data:
    """The text and its tokens."""

    corpus: Literal["pydoc", "ptb", "wikitext", "text"] = option(
        "pydoc",
        "pydoc: the documentation of the running Python; ptb: ptb.train.txt and ptb.valid.txt in the folder "
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
    valid: float = option(0.05, "fraction of the text held out for validation if the corpus has no splits of its own")
    test: float = option(0.05, "fraction of the text held out for the test if the corpus has no splits of its own")

    def __post_init__(self) -> None:
        if self.corpus == "pydoc":
            require(self.path is None, "data.path must be null for pydoc, which reads no path", self.path)
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
                f"data.vocabulary must be null for {self.tokens} tokens; it is an option of word and bpe tokens only",
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
    """Embedding, blocks with one sequence layer each, head."""

    cell: Literal["rnn", "gru", "lstm", "slstm", "transformer", "s4d", "mingru"] = option(
        "gru", "the sequence layer; rnn is a tanh RNN; transformer, s4d and mingru have exact gradients only"
    )
    feedback: float | str = option(
        "bptt", "feedback rule of the backward pass: bptt (exact), ft-bptt, dsf, gate+1, ...", identity="run"
    )
    forward: str = option(
        "sequential", "sequential; newton or newton(tolerance): forward in parallel over time", identity="run"
    )
    layers: int = option(2, "number of blocks")
    width: int = option(256, "number of units of the embedding, of every state and of every block")
    block: Literal["plain", "prenorm", "stacked", "xlstm"] = option(
        "plain",
        "plain: x + rnn(x); prenorm: x + linear(rnn(norm(x))), then x + mlp(norm(x)); stacked: rnn(x); xlstm, for "
        "slstm: x + group_norm(rnn(norm(x))) with a convolution, then x + gated_mlp(norm(x))",
    )
    dropout: float = option(0.0, "dropout probability after the embedding and after every sub-layer")
    uniform: float | None = option(None, "initial weights uniform in (-x, x); null for the default of each layer")
    heads: int = option(8, "transformer: attention heads; slstm: blocks of the recurrent weights")
    convolution: int = option(4, "xlstm block only: tokens that the causal convolution covers; 0 for no convolution")
    window: int = option(256, "transformer only: number of tokens that a token attends to, including itself")
    modes: int = option(16, "s4d only: number of complex modes of every unit")

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
            self.uniform is None or 0 < self.uniform <= 1e38,
            "model.uniform must be a positive number of at most 1e38, or null",
            self.uniform,
        )
        if self.cell in ("transformer", "slstm"):
            require(self.heads >= 1, "model.heads must be at least 1", self.heads)
            words, unit = ("model.heads", self.heads) if self.cell == "slstm" else ("twice model.heads", 2 * self.heads)
            require(self.width % unit == 0, f"model.width must be a multiple of {words}, {unit}", self.width)
        require(self.block != "xlstm" or self.cell == "slstm", "model.cell must be slstm in an xlstm block", self.cell)
        require(self.convolution >= 0, "model.convolution must be at least 0", self.convolution)
        require(self.window >= 1, "model.window must be at least 1", self.window)
        require(self.modes >= 1, "model.modes must be at least 1", self.modes)

    @property
    def rule_keys(self) -> str:
        """The keys of the backward and forward pass with their values, for messages."""
        return f"model.feedback={self.feedback}" + f", model.forward={self.forward}" * (self.forward != "sequential")


@dataclass(frozen=True)
class Train:
    """Length of training, batches, optimizer, learning rate and evaluation."""

    epochs: int = option(1, "passes over the training split")
    steps: int | None = option(None, "number of optimizer steps; overrides train.epochs")
    seed: int = option(1, "seed of the initial weights, the order of the text, dropout and the sample", identity="run")
    batch: int = option(32, "number of sequences in one step, of all processes together")
    accumulate: int = option(1, "number of sequential parts of a step, to save memory")
    eval_batch: int | None = option(None, "number of sequences in a step of evaluation; null for train.batch")
    context: int = option(64, "number of tokens of a sequence in one step; the state is passed to the next step")
    state_reset_prob: float = option(
        0.05, "probability that the state of a sequence is reset before a step, as at the beginning of a text"
    )
    loss: Literal["mean", "window"] = option(
        "mean", "mean: nats per token; window: nats summed over the tokens of a sequence, mean over sequences"
    )
    precision: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "precision of products in training; weights and scores are float32. bfloat16 and float16 use autocast, float16 "
        "also loss scaling, on a GPU only",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "device of the run; auto is cuda if available, else cpu", identity="place"
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp",
        "under torchrun, ddp: every process has all weights; fsdp: weights, gradients and optimizer state are sharded",
        identity="place",
    )
    compile: Literal["default", "reduce-overhead"] | None = option(
        None,
        "mode of torch.compile for the blocks in training; reduce-overhead replays CUDA graphs for equal shapes; null "
        "does not compile",
        identity="place",
    )
    optimizer: Literal["adam", "sgd"] = option("adam", "adam with betas 0.9 and 0.999, or sgd without momentum")
    lr: float = option(3e-3, "largest learning rate", identity="run")
    weight_decay: float = option(0.0, "L2 penalty, added to the gradient")
    warmup: float = option(
        50.0, "number of steps of linear warmup to train.lr; a value below 1 is a fraction of all steps"
    )
    schedule: Literal["constant", "linear", "cosine", "steps"] = option(
        "cosine",
        "learning rate after warmup: constant; linear or cosine decay to train.floor after the last step; steps: "
        "multiplied by train.decay after train.decay_after epochs and then every train.decay_every epochs",
    )
    floor: float = option(0.0, "linear and cosine: final learning rate as a fraction of train.lr")
    decay: float = option(0.1, "steps: factor of each decay")
    decay_after: int = option(10, "steps: number of epochs before the first decay")
    decay_every: int = option(10, "steps: number of epochs from one decay to the next")
    clip: float | None = option(1.0, "maximum norm of the gradient over all weights; null for no clipping")
    evaluations: int = option(10, "number of evaluations on the validation split, evenly spaced, the last at the end")
    alignment: bool = option(
        False,
        "log at every evaluation the alignment of the gradient with exact BPTT, on the first training batch",
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
            self.warmup >= 0 and (self.warmup < 1 or float(self.warmup).is_integer()),
            "train.warmup must be a whole number of steps, or a fraction of them from 0 and below 1",
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
    """Run folder, checkpoints and TensorBoard."""

    dir: str = option(
        "runs/default",
        "folder of the run, created if missing; a folder that holds a run needs --resume",
        identity="place",
    )
    checkpoint_minutes: float = option(
        10.0, "minutes between checkpoints, 0 for one after every step; the last step is always saved", identity="place"
    )
    checkpoints: int = option(2, "number of latest checkpoints to keep", identity="place")
    tensorboard: bool = option(False, "also write the metrics for TensorBoard, into the run folder", identity="place")

    def __post_init__(self) -> None:
        require(bool(self.dir), "run.dir must name a folder", repr(self.dir))
        require(self.checkpoint_minutes >= 0, "run.checkpoint_minutes must be at least 0", self.checkpoint_minutes)
        require(self.checkpoints >= 1, "run.checkpoints must be at least 1", self.checkpoints)


SECTIONS: dict[str, type] = {"data": Data, "model": Model, "train": Train, "run": Run}


@dataclass(frozen=True)
class Config:
    """A whole recipe.

    >>> Config().model.feedback
    'bptt'
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
        """The recipe with every key as YAML text, which `recipe.parse` reads.

        Args:
            encoding: encoding in which the text will be written. For others than UTF-8 the text is ASCII, because
                recipes are read as UTF-8.
        """
        utf8 = codecs.lookup(encoding).name == "utf-8"
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=utf8)
