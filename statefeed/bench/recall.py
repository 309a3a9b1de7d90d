"""The task of ``statefeed bench recall``: the first symbol of a sequence.

The first step of a sequence shows one of eight symbols, every later step a random one of eight others, and the last
output must be the first symbol. Guessing has an accuracy of 1/8; credit must pass through all steps in between.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed.bench.long_memory_task import Batch, Classification

SYMBOLS = 8


class Recall(Classification):
    """Symbols as one-hot vectors (T, B, 16) -> logits of the first one, (B, 8)."""

    title = "recall of the first symbol"
    guess = 1 / SYMBOLS
    inputs = 2 * SYMBOLS
    outputs = SYMBOLS

    def draw(self, B: int, generator: torch.Generator) -> Batch:
        """Symbols, and the first one of every sequence."""
        symbols = sequences(self.length, B, generator)
        return Batch(F.one_hot(symbols, self.inputs).float(), symbols[0])


def sequences(T: int, B: int, generator: torch.Generator) -> Tensor:
    """Symbols (T, B): 0 to 7 at the first step, 8 to 15 at the others."""
    symbols = torch.randint(SYMBOLS, 2 * SYMBOLS, (T, B), generator=generator, device=generator.device)
    symbols[0] = torch.randint(SYMBOLS, (B,), generator=generator, device=generator.device)
    return symbols
