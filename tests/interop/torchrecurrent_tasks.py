"""torchrecurrent's tasks penn_treebank and sequential_mnist: its loop over a cell, and Recurrent over the same cell.

In the environment of ``make interop``, from the root of the repository:

``PYTHONPATH=.:tests build/interop/torchrecurrent/bin/python -m interop.torchrecurrent_tasks penn_treebank DATA``

DATA is the folder with ptb.train.txt and ptb.valid.txt, or with the four IDX files (.gz) of MNIST or Fashion-MNIST.
The package has the loaders of both tasks and its layers, and no program that trains on them. The model is that of its
adding problem: recurrent layer and linear head, trained with Adam.

All contenders start from the same weights and take a step on each batch in turns. A record has the time of a step and
the score on the validation or test split. ``--record MACHINE`` appends it to results/packages/torchrecurrent and writes
the table in docs/custom-cells.md.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchrecurrent
from torch import Tensor, nn
from torch.nn import functional as F
from torchrecurrent import benchmarks

import statefeed as sf
from interop import torchrecurrent_table
from interop.conftest import provenance_of, spread

DIAGONAL = ("BR", "IndRNN", "TRNN")
THEIRS = "torchrecurrent"
CLIP, RATE = 1.0, 1e-3
PARTS = 10  # of a run, each with a median of its own


class Sizes(NamedTuple):
    """Width of the model, and the number of batches of training and of the score."""

    hidden: int
    batches: int
    score_batches: int


class Task(NamedTuple):
    """A task of the package: batches of inputs and targets, and how a model is built and scored."""

    name: str
    shape: str
    train: Iterable[tuple[Tensor, Tensor]]
    score: Iterable[tuple[Tensor, Tensor]]
    inputs: int  # types of tokens, or features
    outputs: int
    tokens: bool  # a prediction and a state that continues for every token, or one prediction a sequence


class Model(nn.Module):
    """Embedding of tokens, one recurrent layer, linear head."""

    def __init__(self, task: Task, cell: str, contender: str, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.theirs = task.tokens, contender == THEIRS
        self.embedding = nn.Embedding(task.inputs, hidden) if task.tokens else nn.Identity()
        layer = getattr(torchrecurrent, cell)(hidden if task.tokens else task.inputs, hidden, batch_first=True)
        self.rnn = layer if self.theirs else recurrent(layer.cells[0], contender, cell in DIAGONAL)
        self.head = nn.Linear(hidden, task.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embedding(x), state)
        return self.head(y if self.tokens else y[:, -1]), state


def recurrent(cell: nn.Module, rule: str, diagonal: bool) -> sf.Recurrent:
    width = cell.hidden_size
    size = (width, width) if cell.uses_double_state() else width
    return sf.Recurrent(cell, rule, state_size=size, batch_first=True, diagonal_jacobian=diagonal)


def penn_treebank(data: Path) -> Task:
    """20 streams of 35 tokens, the package's defaults; the test split is not used."""
    train, valid = data / "ptb.train.txt", data / "ptb.valid.txt"
    corpus = benchmarks.penn_treebank(train, valid, valid)
    types = len(corpus.vocabulary)
    return Task("penn_treebank", "35x20", corpus.train, corpus.validation, types, types, True)


def sequential_mnist(data: Path) -> Task:
    """Images of 28x28 as 784 steps of one pixel, 64 at a time."""
    splits = [
        benchmarks.sequential_mnist(
            idx(data / f"{name}-images-idx3-ubyte.gz"),
            idx(data / f"{name}-labels-idx1-ubyte.gz"),
            batch_size=size,
            generator=torch.Generator().manual_seed(0),
            shuffle=name == "train",
        )
        for name, size in (("train", 64), ("t10k", 500))
    ]
    return Task("sequential_mnist", "784x64", *splits, 1, 10, False)


def idx(file: Path) -> Tensor:
    """The bytes of an IDX file: two zeros, the type 8, the number of dimensions, the sizes, the values."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    sizes = [int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(content[3])]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


TASKS: dict[str, Callable[[Path], Task]] = {"penn_treebank": penn_treebank, "sequential_mnist": sequential_mnist}


class Run:
    """A model in training: one step at a time, with the seconds and the loss of each."""

    def __init__(self, task: Task, cell: str, contender: str, hidden: int) -> None:
        self.model = Model(task, cell, contender, hidden)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.tokens, self.state = task.tokens, None
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, x: Tensor, target: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        y, state = self.model(x, self.state)
        loss = F.cross_entropy(y.flatten(0, -2), target.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.state = detached(state) if self.tokens else None

    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Perplexity of tokens, or the share of sequences in the right class."""
        nats, right, count, state = 0.0, 0, 0, None
        with torch.no_grad():
            for x, target in batches:
                y, after = self.model(x, state)
                state = after if self.tokens else None
                y, target = y.flatten(0, -2), target.flatten()
                nats += float(F.cross_entropy(y, target, reduction="sum"))
                right += int((y.argmax(-1) == target).sum())
                count += len(target)
        return float(torch.tensor(nats / count).exp()) if self.tokens else right / count


def detached(state: Any) -> Any:
    return state.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)


def measure(task: Task, cell: str, rules: list[str], sizes: Sizes) -> dict[str, Any]:
    """Train all contenders side by side; the record without its metadata."""
    runs = {name: Run(task, cell, name, sizes.hidden) for name in (THEIRS, *rules)}
    for k, (x, target) in enumerate(itertools.islice(batches(task), sizes.batches)):
        for run in list(runs.values())[:: -1 if k % 2 else 1]:
            run.step(x, target)
    medians = {name: parts(run.seconds) for name, run in runs.items()}
    return {
        "package": THEIRS,
        "task": task.name,
        "model": cell,
        "shape": f"{task.shape}x{sizes.hidden}",
        "batches": sizes.batches,
        "score": "perplexity" if task.tokens else "accuracy",
        "scores": {name: run.score(itertools.islice(task.score, sizes.score_batches)) for name, run in runs.items()},
        "losses": {name: statistics.fmean(run.losses[-len(run.losses) // PARTS :]) for name, run in runs.items()},
        "step_ms": {name: spread([1e3 * s for s in values]) for name, values in medians.items()},
        "times_faster": {
            name: spread([theirs / ours for theirs, ours in zip(medians[THEIRS], values, strict=True)])
            for name, values in medians.items()
            if name != THEIRS
        },
    }


def batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch; the state of a language model continues from its end to the beginning."""
    while True:
        yield from task.train


def parts(seconds: list[float]) -> list[float]:
    """The median seconds of a step in each part of a run."""
    size = max(1, len(seconds) // PARTS)
    return [statistics.median(seconds[k : k + size]) for k in range(0, size * (len(seconds) // size), size)]


def main(words: list[str]) -> int:
    flags = argparse.ArgumentParser(prog="python -m interop.torchrecurrent_tasks", description=__doc__)
    flags.add_argument("task", choices=TASKS)
    flags.add_argument("data", type=Path)
    flags.add_argument("--cells", default="MGU,IndRNN", help="layers of the package, separated by commas")
    flags.add_argument("--rules", default="bptt,dsf")
    flags.add_argument("--hidden", type=int, default=128)
    flags.add_argument("--batches", type=int, default=300)
    flags.add_argument("--score-batches", type=int, default=1_000_000, help="batches of the score; all if left out")
    flags.add_argument(
        "--record", metavar="MACHINE", help="append to results/packages/torchrecurrent, and write the table"
    )
    flags.add_argument("--data-name", help="name of the data in the record; the folder's if left out")
    values = flags.parse_args(words)
    torch.set_num_threads(1)
    task = TASKS[values.task](values.data)
    for cell in values.cells.split(","):
        found = measure(task, cell, values.rules.split(","), Sizes(values.hidden, values.batches, values.score_batches))
        record = {**found, "data": values.data_name or values.data.name, **provenance_of(THEIRS)}
        print(json.dumps(record), flush=True)
        if values.record is not None:
            torchrecurrent_table.append(values.record, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
