"""Exact backpropagation through time."""

from __future__ import annotations

from dataclasses import dataclass

from statefeed.feedback.protocol import EXACT, Context, Diagonal, KernelRule


@dataclass(frozen=True)
class Exact(Diagonal):
    """Exact gradient, with the full Jacobian.

    Attributes:
        through_torch: use torch's own layer, even if there are kernels for the input.
    """

    through_torch: bool = False

    exact = True

    def resolve(self, context: Context) -> KernelRule:
        return EXACT

    def __str__(self) -> str:
        return "torch" if self.through_torch else "bptt"
