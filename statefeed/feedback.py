"""The feedback rule as a value: which diagonal D stands for the state Jacobian, and how many corrections follow it.

delta_0[t] = e[t] + D[t+1] * delta_0[t+1]
delta_k    = scan_D(e + shift((J - D)^T delta_{k-1}))          k corrections; k = T is exact for every D
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

NAMES = ("bptt", "fused-bptt", "ft-bptt", "dsf", "calibrated", "gate", "jacobian")
_SPELLINGS = (
    'None, "bptt", "fused-bptt", "ft-bptt", "dsf", "calibrated", "gate", "jacobian", a number, or a tensor (S,)'
)

# Above this a stationary diagonal with corrections grows like binom(T, k) before it converges at k near T.
_DIVERGES_ABOVE = 0.9


@dataclass(frozen=True, eq=False, repr=False)
class Feedback:
    """A rule for the gradient of a recurrent state.

    ``delta[t] = e[t] + D[t+1] * delta[t+1]`` followed by k corrections ``delta_k = scan_D(e + shift((J - D)^T
    delta_{k-1}))``; k = 0 is the cheapest, k = T is backpropagation through time for every D (Caillon, Fagnou and
    Allauzen, arXiv 2503.23104, for k = 0 and a fixed D).

    Args:
        diagonal: D, in any of its spellings.

            - ``None`` or ``"bptt"``: no approximation; the layer runs torch's own path.
            - ``"fused-bptt"``: no approximation, through statefeed's kernels where there are any for the input, else
              torch's own path. It tells what the implementation gains from what a rule gains.
            - ``"ft-bptt"`` or ``0.0``: D = 0, fully truncated.
            - ``"dsf"``: linspace(0, 1, S), fixed, never trained; for an LSTM it runs over (h, c) joined, S = 2H.
            - a float, or a tensor of shape (S,): that diagonal, fixed.
            - ``"calibrated"``: the running mean of diag(J[t]), fitted while training.
            - ``"gate"``: the direct path, z[t] of a GRU, f[t] on c and 0 on h of an LSTM; an RNN has none.
            - ``"jacobian"``: diag(J[t]) exactly.

            A string may carry the suffix ``+k``: ``"gate+1"``.
        corrections: k, the number of corrections, each one batched matrix product over all steps.

    Gradient: exact for ``"bptt"``, ``"fused-bptt"`` and k >= T; approximate otherwise. The forward pass is exact under
        every rule.

    Raises:
        ValueError: a spelling that is none of these, a diagonal that is not finite, or a negative k.
        TypeError: a diagonal of another type.

    Warns:
        UserWarning: corrections around a fixed diagonal near 1, which diverge until k is near T.

    Cost: per step O(S) for k = 0; each correction adds 2 * T * B * H * G * H flops.

    Example:
        >>> Feedback("gate+1")
        Feedback('gate', corrections=1)
        >>> Feedback(0.0) == Feedback("ft-bptt")
        True
        >>> str(Feedback(0.5, corrections=2))
        '0.5+2'
    """

    diagonal: str | float | Tensor
    corrections: int = 0

    def __init__(self, diagonal: str | float | Tensor | None, corrections: int = 0) -> None:
        plain: object = diagonal
        k = 0
        if isinstance(diagonal, str):
            plain, k = _parse(diagonal)
        if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
            raise ValueError(f"corrections must be a whole number >= 0, got {corrections!r}")
        if k and corrections:
            raise ValueError(f"corrections are given twice: as the suffix +{k} and as corrections={corrections}")
        object.__setattr__(self, "diagonal", _normalise(plain))
        object.__setattr__(self, "corrections", k or corrections)
        if self.exact and self.corrections:
            raise ValueError(f'feedback "{diagonal}" is exact and takes no corrections, got {self.corrections}')
        _warn_if_divergent(self)

    @property
    def exact(self) -> bool:
        """Whether the gradient is BPTT's own: ``"bptt"`` or ``"fused-bptt"``."""
        return isinstance(self.diagonal, str) and self.diagonal in ("bptt", "fused-bptt")

    def stationary(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The diagonal of shape (size,) where it is known beforehand, else None.

        Args:
            size: S, the width of the state; 2H for the (h, c) of an LSTM.
            dtype: of the returned tensor.
            device: of the returned tensor.

        Returns:
            D of shape (size,), or None for ``"calibrated"``, ``"gate"``, ``"jacobian"`` and the exact rules.

        Example:
            >>> Feedback("dsf").stationary(3, torch.float32, torch.device("cpu"))
            tensor([0.0000, 0.5000, 1.0000])
        """
        if isinstance(self.diagonal, Tensor):
            return self.diagonal.to(device=device, dtype=dtype)
        if isinstance(self.diagonal, float):
            return torch.full((size,), self.diagonal, dtype=dtype, device=device)
        if self.diagonal == "dsf":
            return torch.linspace(0, 1, size, dtype=dtype, device=device)
        return None

    def __str__(self) -> str:
        if isinstance(self.diagonal, Tensor):
            name = f"tensor({self.diagonal.numel()})"
        else:
            name = "ft-bptt" if self.diagonal == 0.0 else str(self.diagonal)
        return f"{name}+{self.corrections}" if self.corrections else name

    def __repr__(self) -> str:
        diagonal = "'ft-bptt'" if isinstance(self.diagonal, float) and not self.diagonal else repr(self.diagonal)
        return f"Feedback({diagonal}, corrections={self.corrections})" if self.corrections else f"Feedback({diagonal})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Feedback) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, int]:
        plain = tuple(self.diagonal.tolist()) if isinstance(self.diagonal, Tensor) else self.diagonal
        return plain, self.corrections


FeedbackLike: TypeAlias = Feedback | str | float | Tensor | None


def _warn_if_divergent(rule: Feedback) -> None:
    if isinstance(rule.diagonal, Tensor):
        largest = float(rule.diagonal.abs().max()) if rule.diagonal.numel() else 0.0
    elif isinstance(rule.diagonal, float):
        largest = abs(rule.diagonal)
    else:
        largest = 1.0 if rule.diagonal == "dsf" else 0.0
    if rule.corrections and largest > _DIVERGES_ABOVE:
        warnings.warn(
            f'feedback "{rule}" adds corrections to a fixed diagonal of up to {largest:g}: they grow like binom(T, k) '
            'until k is near T; "calibrated+1" is the stationary rule that takes corrections well',
            stacklevel=3,
        )


def _parse(spelling: str) -> tuple[str | float, int]:
    match = re.fullmatch(r"(?P<name>.+?)(?:\+(?P<k>\d+))?", spelling.strip())
    name, k = (match["name"], int(match["k"] or 0)) if match else ("", 0)
    if name in NAMES:
        return name, k
    try:
        return float(name), k
    except ValueError:
        raise ValueError(f"feedback must be {_SPELLINGS}, each with an optional suffix +k, got {spelling!r}") from None


def _normalise(diagonal: object) -> str | float | Tensor:
    if diagonal is None:
        return "bptt"
    if isinstance(diagonal, str):
        return 0.0 if diagonal == "ft-bptt" else diagonal
    if isinstance(diagonal, Tensor):
        if diagonal.dim() != 1 or not diagonal.is_floating_point():
            raise ValueError(
                f"a feedback diagonal must be a real floating-point tensor of shape (S,), got {diagonal.dtype} of "
                f"shape {tuple(diagonal.shape)}"
            )
        if not bool(torch.isfinite(diagonal).all()):
            raise ValueError("a feedback diagonal must be finite, got a tensor with NaN or infinity")
        return diagonal.detach().clone()
    if isinstance(diagonal, (int, float)) and not isinstance(diagonal, bool):
        if not math.isfinite(diagonal):
            raise ValueError(f"a feedback diagonal must be finite, got {diagonal}")
        return float(diagonal)
    raise TypeError(f"feedback must be {_SPELLINGS}, got {type(diagonal).__name__}")
