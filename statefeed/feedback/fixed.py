"""Fixed stationary diagonals: a constant, the ramp of DSF, log-spaced horizons, a user-defined tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell
from statefeed.feedback.protocol import Diagonal, Stationary


@dataclass(frozen=True)
class Constant(Stationary):
    """D = value for every unit; 0 is fully truncated BPTT."""

    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a feedback diagonal must be finite, got {self.value}")

    @property
    def largest(self) -> float:
        return abs(self.value)

    def vector(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full((size,), self.value, dtype=dtype, device=device)

    def __str__(self) -> str:
        return str(self.value) if self.value else "ft-bptt"


@dataclass(frozen=True)
class Ramp(Stationary):
    """D = linspace(0, cap, S); cap = 1 is Diagonal State Feedback (arXiv 2503.23104)."""

    cap: float

    def __post_init__(self) -> None:
        if not 0 < self.cap <= 1:
            raise ValueError(f"the cap of a feedback ramp must be above 0 and at most 1, got {self.cap}")

    @property
    def largest(self) -> float:
        return self.cap

    def vector(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.linspace(0, self.cap, size, dtype=dtype, device=device)

    def __str__(self) -> str:
        return "dsf" if self.cap == 1 else f"ramp({_number(self.cap)})"


@dataclass(frozen=True)
class LogSpaced(Stationary):
    """D = 1 - 1 / h, horizons h geometrically spaced from 1 to ``longest`` steps."""

    longest: float

    def __post_init__(self) -> None:
        if not 1 < self.longest < math.inf:
            raise ValueError(f"the longest horizon of a log-spaced feedback must be above 1 step, got {self.longest}")

    @property
    def largest(self) -> float:
        return 1 - 1 / self.longest

    def vector(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return 1 - torch.logspace(0, -math.log10(self.longest), size, dtype=dtype, device=device)

    def __str__(self) -> str:
        return f"log_spaced({_number(self.longest)})"


@dataclass(frozen=True, eq=False)
class Given(Stationary):
    """A user-defined tensor (S,), or (L * directions, S) with one row per layer and direction."""

    values: Tensor

    def __post_init__(self) -> None:
        values = self.values
        if values.dim() not in (1, 2) or not values.is_floating_point():
            raise ValueError(
                "a feedback diagonal must be a real floating-point tensor of shape (S,) or (L * directions, S), got "
                f"{values.dtype} of shape {tuple(values.shape)}"
            )
        if values.is_meta:
            raise ValueError(
                'a feedback diagonal must have values, got a tensor on the device "meta": make it with device="cpu"'
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError("a feedback diagonal must be finite, got a tensor with NaN or infinity")
        object.__setattr__(self, "values", values.detach().clone())

    @property
    def largest(self) -> float:
        return float(self.values.abs().max()) if self.values.numel() else 0.0

    def unsupported_reason(self, cell: Cell | None, size: int, rows: int) -> str | None:
        if self.values.shape in ((size,), (rows, size)):
            return None
        per_layer = "" if cell is None else f", or a row of them for every layer and direction, {rows} here"
        parts = () if cell is None else cell.states[: cell.gradient_parts]
        counted = f" ({', '.join(parts)} joined)" if len(parts) > 1 else ""
        return (
            f"the feedback diagonal must have one value per unit of the state, {size} here{counted}{per_layer}, got "
            f"{tuple(self.values.shape)}"
        )

    def row(self, k: int) -> Diagonal:
        return Given(self.values[k]) if self.values.dim() == 2 else self

    def vector(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.values.to(device=device, dtype=dtype)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Given) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return tuple(self.values.shape), tuple(self.values.flatten().tolist())

    def __str__(self) -> str:
        return f"tensor({'x'.join(str(size) for size in self.values.shape)})"


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")
