"""Batches of tokens: sentences, blocks or continuous streams, in a reproducible order."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statefeed.lm.config import Data, Train

IGNORED = -100  # the ignore_index of torch's cross_entropy: such targets are not part of the loss


class Batch(NamedTuple):
    """The inputs and targets of one training or evaluation step.

    Args:
        inputs: ids, int64 (T, B).
        targets: the next ids, int64 (T, B); `IGNORED` for targets that are not part of the loss.
        lengths: number of valid inputs of each column, int64 (B,); None if all inputs are valid, or if targets alone
            are `IGNORED`.
        is_start: whether the state starts from zero and not from the last state of the previous step.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None
    is_start: bool


class Source(Protocol):
    """Batches of one split, epoch by epoch."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the split, without tokens that are given and never predicted."""

    def __len__(self) -> int:
        """Number of steps of one epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the steps of one epoch, which depend on the seed, the epoch and the step only.

        Args:
            epoch: counted from 0.
            start: the first step to yield.
        """


def training(tokens: NDArray[np.int32], data: Data, recipe: Train) -> Source:
    """The training batches of a recipe.

    Args:
        tokens: ids of the split, int32 (N,).
        data: kind of batches.
        recipe: batch size, context and the seed of the order.
    """
    if data.batches == "sentences":
        return Sentences(tokens, recipe.batch, recipe.context, recipe.seed)
    if data.batches == "blocks":
        return Blocks(tokens, recipe.batch, recipe.context, recipe.seed)
    return Stream(tokens, recipe.batch, recipe.context)


def scoring(tokens: NDArray[np.int32], data: Data, recipe: Train) -> Source:
    """The evaluation batches of a recipe, in the order of the text; every target is predicted exactly once.

    Args:
        tokens: ids of the split, int32 (N,).
        data: kind of batches.
        recipe: evaluation batch size and context. The batch size changes the score of continuous streams only, since
            each stream starts from a zero state.
    """
    batch = min(recipe.eval_batch or recipe.batch, max(1, len(tokens)))
    if data.batches == "sentences":
        return Sentences(tokens, batch, recipe.context)
    if data.batches == "blocks":
        return Blocks(tokens, batch, recipe.context)
    return Stream(tokens, batch, recipe.context, drop_last=False)


class _Segments:
    """Batches of independent segments of text.

    Args:
        tokens: ids, int32 (N,).
        starts: index of the first input of every segment, int64 (P,).
        lengths: number of inputs of every segment, int64 (P,).
        batch: B, segments per step; the last step of an epoch may have fewer.
        seed: seed of the order, which differs from epoch to epoch; None for the order of the text.
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
            indices = order[first : first + self._batch]
            yield Batch(*_segment(self._tokens, self._starts[indices], self._lengths[indices]), is_start=True)


class Sentences(_Segments):
    """Padded batches of sentences, without state between them.

    Args:
        tokens: ids, int32 (N,); the first id, `<bos>`, begins every sentence.
        batch: B, sentences per step.
        context: T, maximum number of inputs of a sentence; longer sentences are truncated.
        seed: seed of the order; None for the order of the text.

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
    """Batches of consecutive blocks of text, without state between them; the last block may be shorter.

    Args:
        tokens: ids, int32 (N,).
        batch: B, blocks per step.
        context: T, number of inputs of a block.
        seed: seed of the order; None for the order of the text.

    >>> [batch.inputs.T.tolist() for batch in Blocks(np.arange(7, dtype=np.int32), batch=2, context=2).epoch(0)]
    [[[0, 1], [2, 3]], [[4, 5]]]
    """

    def __init__(self, tokens: NDArray[np.int32], batch: int, context: int, seed: int | None = None) -> None:
        starts = np.arange(0, len(tokens) - 1, context)
        self.tokens = len(tokens)
        super().__init__(tokens, starts, (len(tokens) - 1 - starts).clip(max=context), batch, seed)


class Stream:
    """Batches of B columns of continuous text, so that every step starts from the final state of the previous one.

    Args:
        tokens: ids, int32 (N,).
        batch: B, number of columns.
        context: T, number of rows of one step.
        drop_last: drop the tokens that do not fill a step, as in training; False predicts every token but the first
            exactly once, as in evaluation.

    >>> [(x.T.tolist(), y.T.tolist()) for x, y, *_ in Stream(np.arange(8, dtype=np.int32), batch=2, context=2).epoch(0)]
    [([[0, 1], [3, 4]], [[1, 2], [4, 5]])]
    """

    def __init__(self, tokens: NDArray[np.int32], batch: int, context: int, drop_last: bool = True) -> None:
        predicted = len(tokens) - 1
        rows = predicted // batch if drop_last else -(-predicted // batch)
        self.tokens = len(tokens)
        self._tokens, self._context = tokens, context
        self._rows = rows // context * context if drop_last else rows
        self._starts = np.arange(batch) * rows
        self._ends = np.minimum(self._starts + rows, predicted)

    def __len__(self) -> int:
        """Steps of one epoch."""
        return -(-self._rows // self._context)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the steps from `start` on; every epoch reads the same text in the same order."""
        for step in range(start, len(self)):
            starts = self._starts + step * self._context
            rows = min(self._context, self._rows - step * self._context)
            inputs, targets, _ = _segment(self._tokens, starts, (self._ends - starts).clip(0, rows))
            yield Batch(inputs, targets, None, is_start=step == 0)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; a copy from the CPU to a GPU uses pinned memory and is asynchronous."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _segment(
    tokens: NDArray[np.int32], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs and targets (T, B) of several segments of text, and the lengths of the segments if they differ.

    Args:
        tokens: ids, int32 (N,).
        starts: index of the first input of every segment, (B,).
        lengths: number of inputs of every segment, (B,).
    """
    t = np.arange(lengths.max())[:, None]
    valid = t < lengths
    gather_index = np.where(valid, starts + t, 0)
    inputs = torch.from_numpy(tokens[gather_index].astype(np.int64))
    targets = torch.from_numpy(np.where(valid, tokens[gather_index + 1], IGNORED).astype(np.int64))
    return inputs, targets, None if valid.all() else torch.from_numpy(lengths)
