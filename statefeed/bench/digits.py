"""The task of ``statefeed bench digits``: a handwritten digit read pixel by pixel.

The 1,797 digits of 8 x 8 pixels that scikit-learn includes, enlarged by repeating pixels: 1,024 steps of one number
for a side of 32. The last output must be the digit; guessing has an accuracy of 1/10. The digits are split once, with
equal shares of every digit: 1,077 for training, 360 for the choice of the learning rate, 360 for the scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from statefeed.bench.long_memory_task import Batch, Classification

_PART = 360


class Split(NamedTuple):
    """The digits by their use."""

    train: Batch
    valid: Batch
    test: Batch


class Digits(Classification):
    """Pixels (T, B, 1) in -1 to 1 -> logits of the digit, (B, 10)."""

    title = "digits pixel by pixel"
    guess = 1 / 10
    inputs = 1
    outputs = 10

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.split = read(length)

    def draw(self, B: int, generator: torch.Generator) -> Batch:
        """Random digits of the training part."""
        x, target = self.split.train
        rows = torch.randint(len(target), (B,), generator=generator, device=generator.device)
        return Batch(x[:, rows], target[rows])

    def held_out(self, tuning: bool, generator: torch.Generator) -> Batch:
        """The validation part for the choice of the learning rate, else the test part."""
        return self.split.valid if tuning else self.split.test


def enlarge(pictures: Tensor, side: int) -> Tensor:
    """Pictures (N, 8, 8) as (N, side, side), by repeating pixels."""
    times = side // pictures.shape[-1]
    return pictures.repeat_interleave(times, 1).repeat_interleave(times, 2)


def read(length: int) -> Split:
    """The digits of scikit-learn as sequences, row by row.

    Args:
        length: 64 times a square.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    digits = torch.from_numpy(found.target)
    pictures = enlarge(torch.from_numpy(found.images).float() / 8 - 1, math.isqrt(length))
    rows, test = train_test_split(range(len(digits)), test_size=_PART, stratify=found.target, random_state=0)
    train, valid = train_test_split(rows, test_size=_PART, stratify=found.target[rows], random_state=0)
    return Split(*(Batch(pictures[part].flatten(1).T.unsqueeze(-1), digits[part]) for part in (train, valid, test)))
