"""Batches of tokens: sentences, blocks or continuous streams, in the same order at every reading."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statefeed.lm.config import Data, Train

IGNORED = -100  # torch's own mark for targets that enter no loss


class Batch(NamedTuple):
    """One step.

    Args:
        inputs: ids, int64 (T, B).
        targets: the ids that follow them, int64 (T, B), `IGNORED` where nothing counts.
        lengths: int64 (B,), how many inputs of each column are text; None where all are, or the rest is only `IGNORED`.
        is_start: whether the state starts from zero, and not from the last state of the step before.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None
    is_start: bool


class Source(Protocol):
    """Batches of one split."""

    @property
    def tokens(self) -> int:
        """The tokens of the split, those that are given and never predicted left out."""

    def __len__(self) -> int:
        """Steps of one epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The steps of one epoch, a pure function of seed, epoch and step.

        Args:
            epoch: counted from 0.
            start: the first step to yield.
        """


def training(tokens: NDArray[np.int32], data: Data, recipe: Train) -> Source:
    """The batches that a recipe trains on.

    Args:
        tokens: ids of the split, int32 (N,).
        data: how they are read.
        recipe: batch, context and the seed of the order.
    """
    if data.batches == "sentences":
        return Sentences(tokens, recipe.batch, recipe.context, recipe.seed)
    if data.batches == "blocks":
        return Blocks(tokens, recipe.batch, recipe.context, recipe.seed)
    return Stream(tokens, recipe.batch, recipe.context)


def scoring(tokens: NDArray[np.int32], data: Data, recipe: Train) -> Source:
    """The batches of the same kind in the order of the text, in which every target is predicted exactly once.

    Args:
        tokens: ids of the split, int32 (N,).
        data: how they are read.
        recipe: evaluation batch and context. The batch matters to continuous streams alone, each of which starts
            from an empty state.
    """
    batch = min(recipe.eval_batch or recipe.batch, max(1, len(tokens)))
    if data.batches == "sentences":
        return Sentences(tokens, batch, recipe.context)
    if data.batches == "blocks":
        return Blocks(tokens, batch, recipe.context)
    return Stream(tokens, batch, recipe.context, whole=True)


class _Segments:
    """Independent segments of text, some at a time.

    Args:
        tokens: ids, int32 (N,).
        starts: the index of the first input of every segment, int64 (P,).
        lengths: the inputs of every segment, int64 (P,).
        batch: B, segments in one step; the last step of an epoch has what is left.
        seed: of the order, which differs from epoch to epoch; None for that of the text.
    """

    def __init__(
        self,
        tokens: NDArray[np.int32],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        batch: int,
        seed: int | None,
    ) -> None:
        self._tokens, self._starts, self._lengths, self._batch, self._seed = tokens, starts, lengths, batch, seed

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = np.arange(len(self._starts))
        if self._seed is not None:
            np.random.default_rng((self._seed, epoch)).shuffle(order)
        for first in range(start * self._batch, len(order), self._batch):
            chosen = order[first : first + self._batch]
            yield Batch(*_segment(self._tokens, self._starts[chosen], self._lengths[chosen]), is_start=True)


class Sentences(_Segments):
    """Sentences side by side, padded after their ends; no state goes from one to another.

    Args:
        tokens: ids, int32 (N,), every sentence beginning with the id that the whole begins with, `<bos>`.
        batch: B, sentences in one step.
        context: T, the most inputs of one sentence; what comes after them and their last target is left out.
        seed: of the order; None for that of the text.

    >>> batch, = Sentences(np.array([0, 5, 1, 0, 6, 7, 1], np.int32), batch=2, context=64).epoch(0)
    >>> batch.inputs.T.tolist(), batch.targets.T.tolist(), batch.lengths.tolist()
    ([[0, 5, 0], [0, 6, 7]], [[5, 1, -100], [6, 7, 1]], [2, 3])
    """

    def __init__(self, tokens: NDArray[np.int32], batch: int, context: int, seed: int | None = None) -> None:
        starts = np.flatnonzero(tokens == tokens[0])
        lengths = np.diff(starts, append=len(tokens)) - 1
        self.tokens, self.trained = int(lengths.sum()), int(lengths.clip(max=context).sum())
        super().__init__(tokens, starts[lengths > 0], lengths[lengths > 0].clip(max=context), batch, seed)


class Blocks(_Segments):
    """Blocks of continuous text, each read without what came before it; the last may be shorter.

    Args:
        tokens: ids, int32 (N,).
        batch: B, blocks in one step.
        context: T, the inputs of a block.
        seed: of the order; None for that of the text.

    >>> [batch.inputs.T.tolist() for batch in Blocks(np.arange(7, dtype=np.int32), batch=2, context=2).epoch(0)]
    [[[0, 1], [2, 3]], [[4, 5]]]
    """

    def __init__(self, tokens: NDArray[np.int32], batch: int, context: int, seed: int | None = None) -> None:
        starts = np.arange(0, len(tokens) - 1, context)
        self.tokens = len(tokens)
        super().__init__(tokens, starts, (len(tokens) - 1 - starts).clip(max=context), batch, seed)


class Stream:
    """A split laid out in B columns of continuous text, so that the state of one step is the start of the next.

    Args:
        tokens: ids, int32 (N,).
        batch: B, the number of columns.
        context: T, the rows of one step.
        whole: False drops what does not fill a step, as training does; True predicts every token but the first exactly
            once, as scoring does.

    >>> [(x.T.tolist(), y.T.tolist()) for x, y, *_ in Stream(np.arange(8, dtype=np.int32), batch=2, context=2).epoch(0)]
    [([[0, 1], [3, 4]], [[1, 2], [4, 5]])]
    """

    def __init__(self, tokens: NDArray[np.int32], batch: int, context: int, whole: bool = False) -> None:
        predicted = len(tokens) - 1
        rows = -(-predicted // batch) if whole else predicted // batch
        self.tokens = len(tokens)
        self._tokens, self._context = tokens, context
        self._rows = rows if whole else rows // context * context
        self._starts = np.arange(batch) * rows
        self._ends = np.minimum(self._starts + rows, predicted)

    def __len__(self) -> int:
        """Steps of one epoch."""
        return -(-self._rows // self._context)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The steps from `start` on; every epoch is the same text in the same order."""
        for step in range(start, len(self)):
            starts = self._starts + step * self._context
            rows = min(self._context, self._rows - step * self._context)
            inputs, targets, _ = _segment(self._tokens, starts, (self._ends - starts).clip(0, rows))
            yield Batch(inputs, targets, None, is_start=step == 0)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from the CPU to a GPU it goes through pinned memory, without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _segment(
    tokens: NDArray[np.int32], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs and targets (T, B) of segments of text side by side, and their lengths where they differ.

    Args:
        tokens: ids, int32 (N,).
        starts: the index of the first input of every segment, (B,).
        lengths: the inputs of every segment, (B,).
    """
    t = np.arange(lengths.max())[:, None]
    valid = t < lengths
    gather_index = np.where(valid, starts + t, 0)
    inputs = torch.from_numpy(tokens[gather_index].astype(np.int64))
    targets = torch.from_numpy(np.where(valid, tokens[gather_index + 1], IGNORED).astype(np.int64))
    return inputs, targets, None if valid.all() else torch.from_numpy(lengths)
