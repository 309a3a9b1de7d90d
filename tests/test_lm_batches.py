"""Batches: each column is continuous text, each target the token after its input."""

import numpy as np
import pytest
import torch

from statefeed.lm.batches import IGNORED, Stream


@pytest.mark.parametrize(("count", "batch", "context"), [(50, 4, 5), (33, 4, 8), (10, 3, 2), (7, 2, 3), (200, 7, 13)])
def test_training_columns_are_continuous_text(count: int, batch: int, context: int) -> None:
    stream = Stream(np.arange(count, dtype=np.int32), batch, context)
    steps = list(stream.epoch(0))
    assert len(steps) == len(stream) == (count - 1) // batch // context
    assert [step.fresh for step in steps] == [True] + [False] * (len(steps) - 1)
    inputs, targets = (torch.cat([step[part] for step in steps]) for part in (0, 1))
    assert inputs.dtype == targets.dtype == torch.int64
    assert all(part.shape == (context, batch) for step in steps for part in step[:2])
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[1:], targets[:-1])
    assert torch.equal(inputs[0], torch.arange(batch) * ((count - 1) // batch))


@pytest.mark.parametrize(("count", "batch", "context"), [(50, 4, 5), (34, 4, 8), (10, 3, 20), (5, 8, 3), (2, 1, 1)])
def test_scoring_predicts_every_token_but_the_first_once(count: int, batch: int, context: int) -> None:
    stream = Stream(np.arange(count, dtype=np.int32), batch, context, whole=True)
    steps = list(stream.epoch(0))
    assert len(steps) == len(stream)
    inputs, targets = (torch.cat([step[part] for step in steps]) for part in (0, 1))
    counted = targets != IGNORED
    assert sorted(targets[counted].tolist()) == list(range(1, count))
    assert torch.equal(inputs[counted] + 1, targets[counted])
    assert all(len(step[0]) == context for step in steps[:-1])
