"""Time-varying diagonals: the direct path of the cell, and the diagonal of its Jacobian.

The backends compute these two in their kernels; other time-varying rules pass rows of D to the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from statefeed.cells.protocol import Cell
from statefeed.feedback.protocol import Context, KernelRule, Linearization, TimeVarying


@dataclass(frozen=True)
class Gate(TimeVarying):
    """Diagonal of the direct path: z[t] of a GRU, f[t] on c (SLSTM: c and n) and 0 on h of an LSTM."""

    def unsupported_reason(self, cell: Cell | None, size: int, rows: int) -> str | None:
        if cell is not None and not cell.has_direct_path:
            return (
                f'feedback "{self}" needs a direct path between states, and the cell {cell.name!r} has none: use '
                '"jacobian" or "calibrated"'
            )
        return super().unsupported_reason(cell, size, rows)

    def rows(self, at: Linearization) -> Sequence[Tensor | None]:
        return at.cell.direct_path(at.at)

    def resolve(self, context: Context) -> KernelRule:
        return KernelRule("direct")

    def __str__(self) -> str:
        return "gate"


@dataclass(frozen=True)
class Jacobian(TimeVarying):
    """Diagonal of the Jacobian, diag(J[t]); for an LSTM dh/dh' at fixed c', and f on c."""

    is_jacobian = True

    def unsupported_reason(self, cell: Cell | None, size: int, rows: int) -> str | None:
        return None  # statefeed.Recurrent estimates it

    def rows(self, at: Linearization) -> Sequence[Tensor]:
        return at.cell.jacobian_diagonal(at.at, at.w_hh)

    def resolve(self, context: Context) -> KernelRule:
        return KernelRule("jacobian")

    def __str__(self) -> str:
        return "jacobian"
