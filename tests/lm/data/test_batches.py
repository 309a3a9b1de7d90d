"""Batches: what each column is a piece of, each target the token after its input, nothing twice, nothing lost."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from statefeed.lm.config import Data, Train
from statefeed.lm.data.batches import IGNORED, Batch, Blocks, Sentences, Source, Stream, scoring, training


@pytest.mark.parametrize(("count", "batch", "context"), [(50, 4, 5), (33, 4, 8), (10, 3, 2), (7, 2, 3), (200, 7, 13)])
def test_training_columns_are_continuous_text(count: int, batch: int, context: int) -> None:
    stream = Stream(np.arange(count, dtype=np.int32), batch, context)
    steps = list(stream.epoch(0))
    assert len(steps) == len(stream) == (count - 1) // batch // context
    assert [step.is_start for step in steps] == [True] + [False] * (len(steps) - 1)
    inputs, targets = (torch.cat([step[part] for step in steps]) for part in (0, 1))
    assert inputs.dtype == targets.dtype == torch.int64
    assert all(part.shape == (context, batch) for step in steps for part in step[:2])
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[1:], targets[:-1])
    assert torch.equal(inputs[0], torch.arange(batch) * ((count - 1) // batch))


@pytest.mark.parametrize(("count", "batch", "context"), [(50, 4, 5), (34, 4, 8), (10, 3, 20), (5, 8, 3), (2, 1, 1)])
def test_scoring_predicts_every_token_but_the_first_once(count: int, batch: int, context: int) -> None:
    stream = Stream(np.arange(count, dtype=np.int32), batch, context, drop_last=False)
    steps = list(stream.epoch(0))
    assert len(steps) == len(stream)
    inputs, targets = (torch.cat([step[part] for step in steps]) for part in (0, 1))
    counted = targets != IGNORED
    assert sorted(targets[counted].tolist()) == list(range(1, count))
    assert torch.equal(inputs[counted] + 1, targets[counted])
    assert all(len(step[0]) == context for step in steps[:-1])


def lines(count: int, seed: int = 0) -> list[list[int]]:
    """Sentences of 1 to 9 ids of their own, ending in 1."""
    lengths = np.random.default_rng(seed).integers(1, 10, count)
    return [[100 * i + j + 3 for j in range(length - 1)] + [1] for i, length in enumerate(lengths)]


def flat(sentences: list[list[int]]) -> NDArray[np.int32]:
    """Each after a 0, and a last 0 behind the end of the text, as the words of a text are."""
    return np.array([i for sentence in sentences for i in [0, *sentence]] + [0], np.int32)


@pytest.mark.parametrize(("count", "batch", "context"), [(20, 4, 64), (21, 4, 5), (3, 8, 2), (1, 1, 9)])
def test_every_sentence_is_read_once_and_truncated(count: int, batch: int, context: int) -> None:
    sentences = lines(count)
    source = Sentences(flat(sentences), batch, context, seed=3)
    steps = list(source.epoch(0))
    assert len(steps) == len(source) == -(-count // batch)
    assert source.tokens == sum(map(len, sentences))
    read = []
    for inputs, targets, lengths, fresh in steps:
        assert fresh
        assert inputs.shape == targets.shape
        ends = [len(inputs)] * inputs.shape[1] if lengths is None else lengths.tolist()
        for column, end in enumerate(ends):
            assert targets[end:, column].eq(IGNORED).all()
            assert inputs[:end, column].tolist() == [0, *targets[: end - 1, column].tolist()]
            read.append(targets[:end, column].tolist())
        assert len(inputs) == max(ends)
    assert sorted(read) == sorted(sentence[:context] for sentence in sentences)


def test_sentences_are_scored_in_their_order() -> None:
    sentences = lines(6)
    (batch,) = Sentences(flat(sentences), batch=6, context=64).epoch(0)
    assert [column[column != IGNORED].tolist() for column in batch.targets.T] == sentences


@pytest.mark.parametrize(("count", "batch", "context"), [(41, 4, 5), (44, 4, 5), (42, 3, 10), (2, 4, 9)])
@pytest.mark.parametrize("seed", [None, 3])
def test_blocks_predict_every_token_but_the_first_once(count: int, batch: int, context: int, seed: int | None) -> None:
    source = Blocks(np.arange(count, dtype=np.int32), batch, context, seed)
    steps = list(source.epoch(0))
    assert len(steps) == len(source)
    assert source.tokens == count
    predicted = []
    for inputs, targets, lengths, fresh in steps:
        assert fresh
        assert (inputs[0] % context == 0).all()
        real = targets != IGNORED
        assert torch.equal(inputs[real] + 1, targets[real])
        assert lengths is None or torch.equal(real.sum(0), lengths)
        predicted += targets[real].tolist()
    assert sorted(predicted) == list(range(1, count))
    if seed is None:
        assert all(torch.equal(inputs[0], inputs[0].sort().values) for inputs, *_ in steps)


@pytest.mark.parametrize("kind", ["sentences", "blocks", "stream"])
def test_an_epoch_is_the_same_from_any_step_on(kind: Literal["sentences", "blocks", "stream"]) -> None:
    def source(seed: int) -> Source:
        data = Data(tokens="word", batches=kind)
        return training(flat(lines(40)), data, Train(batch=3, context=4, seed=seed))

    def same(a: Iterator[Batch], b: Iterator[Batch]) -> bool:
        return all(
            torch.equal(x.inputs, y.inputs) and torch.equal(x.targets, y.targets) and x.is_start == y.is_start
            for x, y in zip(a, b, strict=True)
        )

    whole = list(source(1).epoch(2))
    for start in (0, 1, 5, len(whole)):
        assert same(source(1).epoch(2, start), iter(whole[start:]))
    if kind == "stream":
        assert same(source(2).epoch(7), iter(whole))
    else:
        assert not same(source(1).epoch(3), iter(whole))
        assert not same(source(2).epoch(2), iter(whole))


def test_scoring_reads_every_target_in_batches_of_its_own_size() -> None:
    tokens = flat(lines(40))
    for kind in ("sentences", "blocks", "stream"):
        data = Data(tokens="word", batches=kind)  # type: ignore[arg-type]
        source = scoring(tokens, data, Train(batch=3, eval_batch=5, context=64))
        steps = list(source.epoch(0))
        assert steps[0].inputs.shape[1] == 5 or kind == "blocks"
        count = sum(int((step.targets != IGNORED).sum()) for step in steps)
        assert count == (source.tokens if kind == "sentences" else source.tokens - 1)
