"""Exact backpropagation through time."""

from __future__ import annotations

from dataclasses import dataclass

from statefeed.feedback.protocol import EXACT, Context, Diagonal, KernelRule


@dataclass(frozen=True)
class Exact(Diagonal):
    """The whole Jacobian.

    Attributes:
        fused: through statefeed's kernels where there are any for the input; torch's own layer otherwise.
    """

    fused: bool

    exact = True

    def resolve(self, context: Context) -> KernelRule:
        return EXACT

    def __str__(self) -> str:
        return "fused-bptt" if self.fused else "bptt"
