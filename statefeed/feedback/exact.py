"""Exact backpropagation through time."""

from __future__ import annotations

from dataclasses import dataclass

from statefeed.feedback.protocol import EXACT, Context, Diagonal, KernelRule


@dataclass(frozen=True)
class Exact(Diagonal):
    """The whole Jacobian.

    Attributes:
        through_torch: torch's own layer, whether there are kernels for the input or not.
    """

    through_torch: bool = False

    exact = True

    def resolve(self, context: Context) -> KernelRule:
        return EXACT

    def __str__(self) -> str:
        return "torch" if self.through_torch else "bptt"
