"""The task of ``statefeed bench adding``: the sum of two marked numbers of a sequence.

Every step of a sequence has a number in (0, 1) and a mark, which is 1 at one step of the first half and one of the
second, else 0. The last output must be the sum of the two marked numbers (Hochreiter and Schmidhuber, 1997). Credit
must pass from the end to the marks. Answering 1 always has a squared error of 1/6.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed.bench.long_memory_task import Batch, Task


class Adding(Task):
    """Numbers and marks (T, B, 2) -> their sum, (B, 1)."""

    title = "adding problem"
    metric = "error"
    guess = 1 / 6
    solved_at = 0.01
    inputs = 2
    outputs = 1

    def draw(self, B: int, generator: torch.Generator) -> Batch:
        """Numbers and marks, and the sums of the marked numbers."""
        T, device = self.length, generator.device
        values, marks = torch.rand(T, B, generator=generator, device=device), torch.zeros(T, B, device=device)
        first = torch.randint(0, T // 2, (1, B), generator=generator, device=device)
        second = torch.randint(T // 2, T, (1, B), generator=generator, device=device)
        marks.scatter_(0, first, 1.0).scatter_(0, second, 1.0)
        return Batch(torch.stack([values, marks], -1), (values * marks).sum(0))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Squared error, the mean over the sequences."""
        return F.mse_loss(output.squeeze(-1), target)

    def score(self, output: Tensor, target: Tensor) -> float:
        """The same squared error."""
        return float(self.loss(output, target))
