"""Options of the benchmarks: dataclass fields that are also flags, and their checks."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, TypeVar

import statefeed as sf

V = TypeVar("V")

FEWEST_REPEATS = 5
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
LAYER_GATES = GATES | {"slstm": 4}  # the cells of `layers`; torch has no sLSTM
SLSTM_HEADS = 4
# By device; tf32 is float32 with products in TF32 (10 bits of mantissa) by cuBLAS and cuDNN.
DTYPES = {"cpu": ("float32", "float64", "bfloat16"), "cuda": ("float32", "float64", "tf32", "bfloat16")}
TRAINING_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16")}
PASSES = ("training", "forward")
METHODS = ("auto", "sequential", "prefix", "fft")
# Shapes of `layers` that --shapes does not name: dense, with long series and small widths, and packed.
DENSE = "2000x2x32,500x1x64,1024x1x128,512x4x256,100x16x64,32x256x128,64x32x256,64x128x256,50x64x1024"
PACKED = "100x16x64,500x16x64,1000x16x128"
MEMORY_MARK = Path("/proc/self/clear_refs")


class OptionError(ValueError):
    """Invalid option; ``statefeed bench`` prints the message and exits with code 2."""


def option(default: V, help: str) -> V:
    """A dataclass field with its default and its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Options of every benchmark."""

    fewest: ClassVar[int] = FEWEST_REPEATS

    repeats: int = option(
        9, "repetitions, at least 5; contenders are interleaved, and medians and spreads are over repetitions"
    )
    threads: int | None = option(None, "torch threads; null for torch's default")
    device: Literal["cpu", "cuda"] = option("cpu", "device")
    smoke: bool = option(False, "tiny shapes and one repetition, to check that the benchmark runs")
    output: str = option("bench.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        if self.repeats < self.fewest:
            raise OptionError(f"repeats must be at least {self.fewest} for a median and a spread, got {self.repeats}")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads must be at least 1, got {self.threads}")
        if self.device == "cuda":
            import torch  # here, so that help and other errors are answered without it

            if not torch.cuda.is_available():
                raise OptionError("device must be cpu here, got cuda: torch sees no GPU")
        if Path(self.output).suffix != ".jsonl":
            raise OptionError(f"output must name a .jsonl file, got {self.output!r}")
        check_folder(Path(self.output))

    @property
    def rounds(self) -> int:
        """Repetitions of this run."""
        return 1 if self.smoke else self.repeats


class Shape(NamedTuple):
    """T steps, B sequences, H features of the state and of the input."""

    T: int
    B: int
    H: int

    def __str__(self) -> str:
        return f"{self.T}x{self.B}x{self.H}"


def check_folder(output: Path) -> None:
    """Raise an ``OptionError``, before anything is measured, if the folder of the records does not exist.

    Also if the records or the figure next to them have the name of a folder.
    """
    if not output.parent.is_dir():
        raise OptionError(f"output must be in an existing folder, got {str(output)!r}")
    for path in (output, output.with_suffix(".png")):
        if path.is_dir():
            raise OptionError(f"output must name files that can be written, but {str(path)!r} is a folder")


def names(flag: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """Parse comma-separated words.

    Raises:
        OptionError: no word, or a word that is not allowed.

    Example:
        >>> names("cells", "gru,lstm", ("rnn", "gru", "lstm"))
        ['gru', 'lstm']
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in allowed:
            near = difflib.get_close_matches(word.lower(), allowed, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise OptionError(f"{flag} must be among {', '.join(allowed)}, separated by commas, got {word!r}{hint}")
    return words


def numbers(flag: str, text: str) -> list[int]:
    """Parse comma-separated integers of at least 1; returns them in ascending order.

    Raises:
        OptionError: anything else.

    Example:
        >>> numbers("steps", "256,64")
        [64, 256]
    """
    try:
        values = sorted({int(word) for word in text.split(",")})
    except ValueError:
        values = [0]
    if values[0] < 1:
        raise OptionError(f"{flag} must be integers of at least 1, separated by commas, got {text!r}")
    return values


def shapes(text: str) -> list[Shape]:
    """Parse comma-separated shapes TxBxH.

    Raises:
        OptionError: anything else.

    Example:
        >>> shapes("64x32x256")
        [Shape(T=64, B=32, H=256)]
    """
    result = []
    for word in text.split(","):
        try:
            shape = Shape(*(int(size) for size in word.split("x")))
        except (TypeError, ValueError):
            shape = Shape(0, 0, 0)
        if min(shape) < 1:
            raise OptionError(f"shapes must be TxBxH, separated by commas, such as 64x32x256, got {word!r}")
        result.append(shape)
    return list(dict.fromkeys(result))


def rules_of(cell: str, rules: str) -> list[str]:
    """The rules that a cell supports.

    Raises:
        OptionError: an invalid spelling.

    Example:
        >>> rules_of("rnn", "dsf,gate+1")
        ['dsf']
    """
    result = []
    for rule in (word.strip() for word in rules.split(",")):
        try:
            feedback = sf.Feedback(rule)
        except ValueError as error:
            raise OptionError(f"rules: {error}") from None
        if not (cell == "rnn" and str(feedback.diagonal) == "gate") and rule not in result:
            result.append(rule)
    return result


def _check_rules(cells: str, rules: str, allowed: tuple[str, ...] = tuple(GATES)) -> None:
    """Raise unless every cell supports one of the rules."""
    for cell in names("cells", cells, allowed):
        if not rules_of(cell, rules):
            raise OptionError(f"rules must include one that an {cell} supports, got {rules!r}: it has no gate")


# Rules are checked last: they need torch, and other errors are answered without it.


def check_projection(projection: int, cells: str, sizes: Sequence[Shape]) -> None:
    """Raise unless an LSTM of every shape has such a projection, or there is none (0)."""
    widest = min((shape.H for shape in sizes), default=projection + 1) - 1
    if not 0 <= projection <= widest:
        raise OptionError(f"projection must be 0 to {widest}, fewer units than the width, got {projection}")
    if projection and cells != "lstm":
        raise OptionError(f"projection needs cells=lstm, because only an lstm projects its output, got cells={cells}")


@dataclass(frozen=True)
class LayerOptions(Options):
    """A stack of layers, forward and backward or forward alone: cell by rule by shape by dtype."""

    cells: str = option(
        "rnn,gru,lstm",
        "among rnn (tanh), gru, lstm and slstm, separated by commas; slstm has 4 heads, and other rivals than torch.nn",
    )
    rules: str = option(
        "bptt,dsf,gate,jacobian,gate+1",
        "feedback rules, separated by commas; gate is skipped for an rnn, which has no gate",
    )
    shapes: str | None = option(
        None,
        "steps x sequences x width, separated by commas; input and state have the same width; null for "
        f"{DENSE}, with --packed {PACKED}",
    )
    dtypes: str = option(
        "float32,bfloat16", "among float32, float64, bfloat16 (autocast) and, on a GPU, tf32, separated by commas"
    )
    layers: int = option(1, "layers of the stack")
    bidirectional: bool = option(False, "both directions")
    projection: int = option(0, "proj_size of an lstm, below the width; 0: no projection")
    packed: bool = option(
        False,
        "packed sequences of T / 2 to T steps, against torch.nn packed, and padded with the padding computed in vain",
    )
    pass_: str = option(
        "training",
        "training: forward and backward; forward: without autograd (torch.no_grad); or both, separated by commas",
    )
    output: str = option("layers.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes(self.shape_list)
        names("dtypes", self.dtypes, DTYPES[self.device])
        names("pass", self.pass_, PASSES)
        if self.layers < 1:
            raise OptionError(f"layers must be at least 1, got {self.layers}")
        check_projection(self.projection, self.cells, [] if self.smoke else shapes(self.shape_list))
        if self.packed and any(shape.T < 2 for shape in shapes(self.shape_list)):
            raise OptionError(f"packed shapes must have at least 2 steps, got {self.shape_list}")
        cells = names("cells", self.cells, tuple(LAYER_GATES))
        if "slstm" in cells and (self.layers > 1 or self.bidirectional or self.packed):
            raise OptionError("slstm is measured as one layer of one direction on dense input: omit it, or these flags")
        if "slstm" in cells and any(shape.H % SLSTM_HEADS for shape in shapes(self.shape_list)):
            raise OptionError(f"the widths of slstm must be multiples of {SLSTM_HEADS}, got {self.shape_list}")
        _check_rules(self.cells, self.rules, tuple(LAYER_GATES))

    @property
    def shape_list(self) -> str:
        """The shapes, or those of the kind of input where none are named."""
        return self.shapes or (PACKED if self.packed else DENSE)


@dataclass(frozen=True)
class ScanOptions(Options):
    """The methods of diagonal_scan, for a fixed and for a time-varying diagonal."""

    steps: str = option("64,256,1024,4096,16384,65536", "values of T, separated by commas")
    widths: str = option("64,256,512,2048", "values of S, separated by commas")
    methods: str = option("auto,sequential,prefix,fft", f"among {', '.join(METHODS)}, separated by commas")
    output: str = option("scan.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers("steps", self.steps)
        numbers("widths", self.widths)
        names("methods", self.methods, METHODS)


@dataclass(frozen=True)
class MemoryOptions(Options):
    """One layer's peak memory, forward and backward, in float32."""

    cells: str = option("rnn,gru,lstm", "among rnn (tanh), gru and lstm, separated by commas")
    rules: str = option(
        "bptt,dsf,jacobian,gate+1", "feedback rules, separated by commas; gate is skipped for an rnn, which has no gate"
    )
    shapes: str = option("64x32x256,256x32x512", "steps x sequences x width, separated by commas")
    output: str = option("memory.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes(self.shapes)
        names("cells", self.cells, tuple(GATES))
        if self.device == "cpu" and not MEMORY_MARK.exists():
            raise OptionError(f"memory on a cpu needs Linux, which counts the memory of a process, got {sys.platform}")
        _check_rules(self.cells, self.rules)


@dataclass(frozen=True)
class TrainingOptions(Options):
    """Training end to end: a GRU of 1x256 on Penn Treebank, or of 3x512 on WikiText-103."""

    recipe: Literal["ptb-gru-1x256", "wikitext103-gru-3x512"] = option("ptb-gru-1x256", "published recipe")
    data: str | None = option(
        None, "folder with the train and valid split of Penn Treebank; null for synthetic text of the recipe's kind"
    )
    rules: str = option(
        "torch,bptt,dsf,gate+1", "feedback rules, separated by commas; torch is the trainer with torch's own layer"
    )
    dtypes: str = option(
        "float32,bfloat16", "among float32, bfloat16 (autocast) and, on a GPU, tf32, separated by commas"
    )
    steps: int = option(3, "training steps per repetition")
    output: str = option("training.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        names("dtypes", self.dtypes, TRAINING_DTYPES[self.device])
        if self.steps < 1:
            raise OptionError(f"steps must be at least 1, got {self.steps}")
        if self.data is not None and self.recipe != "ptb-gru-1x256":
            raise OptionError(f"data is for the recipe ptb-gru-1x256, but {self.recipe} uses synthetic text: omit it")
        if self.data is not None and not Path(self.data).is_dir():
            raise OptionError(f"data must be a folder with the splits of Penn Treebank, got {self.data!r}")
        rules_of("gru", self.rules)
