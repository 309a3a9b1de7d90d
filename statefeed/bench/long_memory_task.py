"""What defines a task of long memory: its sequences, its loss, its score and when it is solved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

HELD_OUT = 512  # sequences, of a task that draws them at random


class Batch(NamedTuple):
    """Sequences and what a model must answer after their last step.

    Attributes:
        x: (T, B, inputs).
        target: (B,).
    """

    x: Tensor
    target: Tensor


class Task(ABC):
    """A task whose sequences are answered after their last step.

    Args:
        length: steps of a sequence.

    Attributes:
        title: its name in tables and figures.
        metric: the key of its score in a record: "error", the lower the better, or "accuracy".
        guess: the score of guessing.
        solved_at: the score at which it is solved.
        inputs: features of a step.
        outputs: features of the answer.
    """

    title: ClassVar[str]
    metric: ClassVar[str]
    guess: ClassVar[float]
    solved_at: ClassVar[float]
    inputs: ClassVar[int]
    outputs: ClassVar[int]

    def __init__(self, length: int) -> None:
        self.length = length

    @abstractmethod
    def draw(self, B: int, generator: torch.Generator) -> Batch:
        """Random sequences for training."""

    def held_out(self, tuning: bool, generator: torch.Generator) -> Batch:
        """The sequences of the score.

        Args:
            tuning: whether the score chooses a learning rate. A task with a finite number of sequences has others then.
            generator: of sequences that are drawn at random, before those of the training.
        """
        return self.draw(HELD_OUT, generator)

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of answers (B, outputs)."""

    @abstractmethod
    def score(self, output: Tensor, target: Tensor) -> float:
        """The score of answers (B, outputs)."""

    @classmethod
    def is_solved(cls, score: float) -> bool:
        """Whether a score is at least as good as ``solved_at``."""
        return score <= cls.solved_at if cls.metric == "error" else score >= cls.solved_at


class Classification(Task):
    """A task whose answer is one of ``outputs`` classes; ``target`` has their numbers."""

    metric = "accuracy"
    solved_at = 0.9

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the logits."""
        return F.cross_entropy(output, target)

    def score(self, output: Tensor, target: Tensor) -> float:
        """The fraction of right answers."""
        return float((output.argmax(-1) == target).float().mean())
