"""The feedback rule as a value: which diagonal D stands for the state Jacobian, and how many corrections follow it.

delta_0[t] = e[t] + D[t+1] * delta_0[t+1]
delta_k    = scan_D(e + shift((J - D)^T delta_{k-1}))          k corrections; k = T is exact for every D
"""

from __future__ import annotations

import copy
import math
import numbers
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

NAMES = ("bptt", "fused-bptt", "ft-bptt", "dsf", "calibrated", "fitted", "gate", "jacobian")
_SPELLINGS = (
    'None, "bptt", "fused-bptt", "ft-bptt", "dsf", "ramp(cap)", "log_spaced(longest)", "calibrated", "fitted", "gate", '
    '"jacobian", a number, or a tensor (S,) or (L * directions, S)'
)

# Above this a stationary diagonal with corrections grows like binom(T, k) before it converges at k near T.
_DIVERGES_ABOVE = 0.9


class Spaced(NamedTuple):
    """A stationary diagonal that a bound spaces over the units, whatever their number.

    ``ramp(cap)`` is linspace(0, cap, S); ``log_spaced(longest)`` is 1 - 1 / h, h from 1 to longest in even ratios.
    """

    name: str
    bound: float

    def over(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Its values, (size,)."""
        if self.name == "ramp":
            return torch.linspace(0, self.bound, size, dtype=dtype, device=device)
        return 1 - torch.logspace(0, -math.log10(self.bound), size, dtype=dtype, device=device)

    @property
    def largest(self) -> float:
        return self.bound if self.name == "ramp" else 1 - 1 / self.bound

    def __str__(self) -> str:
        return f"{self.name}({repr(self.bound).removesuffix('.0')})"


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
            - ``"ramp(cap)"`` and ``"log_spaced(longest)"``: as ``Feedback.ramp`` and ``Feedback.log_spaced`` say.
            - a float, or a tensor of shape (S,): that diagonal, fixed. A tensor (L * directions, S) has one row for
              every layer and direction, as the buffer ``layer.diagonal`` of the next two.
            - ``"calibrated"``: the running mean of diag(J[t]), taken while training.
            - ``"fitted"``: the least-squares fit a of g[t] - e[t] = a * g[t+1], unit by unit, g being the exact state
              gradient: ``a = sum (g[t] - e[t]) g[t+1] / sum g[t+1]^2``. In training every 50th backward pass, the first
              included, is exact BPTT and fits it anew.
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

    Cost: per step O(S) for k = 0; each correction adds 2 * T * B * H * G * H flops. An exact pass of ``"fitted"`` is a
        loop over time, about as long as torch's own.

    Example:
        >>> Feedback("gate+1")
        Feedback('gate', corrections=1)
        >>> Feedback(0.0) == Feedback("ft-bptt")
        True
        >>> str(Feedback(0.5, corrections=2))
        '0.5+2'
    """

    diagonal: str | float | Tensor | Spaced
    corrections: int = 0

    def __init__(self, diagonal: str | float | Tensor | Spaced | None, corrections: int = 0) -> None:
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

    @classmethod
    def ramp(cls, cap: float, corrections: int = 0) -> Feedback:
        """D = linspace(0, cap, S): the published ramp, stopped short of 1.

        Args:
            cap: the largest value, above 0 and at most 1, which is ``"dsf"``. It runs over (h, c) joined for an LSTM.
            corrections: k.

        Example:
            >>> str(Feedback.ramp(0.95)), Feedback.ramp(1) == Feedback("dsf")
            ('ramp(0.95)', True)
        """
        return cls(_spaced("ramp", cap), corrections)

    @classmethod
    def log_spaced(cls, longest: float, corrections: int = 0) -> Feedback:
        """D = 1 - 1 / h, with horizons h from 1 to ``longest`` steps in even ratios.

        A unit with the value d keeps credit over about 1 / (1 - d) steps; here as many units keep it over 1 to 2 steps
        as over 32 to 64.

        Args:
            longest: horizon of the last unit in steps, above 1. They run over (h, c) joined for an LSTM.
            corrections: k.

        Example:
            >>> Feedback.log_spaced(100).stationary(3, torch.float32, torch.device("cpu"))
            tensor([0.0000, 0.9000, 0.9900])
        """
        return cls(_spaced("log_spaced", longest), corrections)

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
            D of shape (size,), or None for ``"calibrated"``, ``"fitted"``, ``"gate"``, ``"jacobian"`` and the exact
            rules.

        Example:
            >>> Feedback("dsf").stationary(3, torch.float32, torch.device("cpu"))
            tensor([0.0000, 0.5000, 1.0000])
        """
        if isinstance(self.diagonal, Tensor):
            return self.diagonal.to(device=device, dtype=dtype)
        if isinstance(self.diagonal, float):
            return torch.full((size,), self.diagonal, dtype=dtype, device=device)
        if isinstance(self.diagonal, Spaced):
            return self.diagonal.over(size, dtype, device)
        if self.diagonal == "dsf":
            return torch.linspace(0, 1, size, dtype=dtype, device=device)
        return None

    def row(self, k: int) -> Feedback:
        """The rule of one layer and direction: this one, or the row k of a diagonal that has one for each.

        Example:
            >>> Feedback(torch.tensor([[0.5], [0.25]])).row(1)
            Feedback(tensor([0.2500]))
        """
        if not (isinstance(self.diagonal, Tensor) and self.diagonal.dim() == 2):
            return self
        rule = copy.copy(self)
        object.__setattr__(rule, "diagonal", self.diagonal[k])
        return rule

    def __str__(self) -> str:
        if isinstance(self.diagonal, Tensor):
            name = f"tensor({'x'.join(str(size) for size in self.diagonal.shape)})"
        else:
            name = "ft-bptt" if self.diagonal == 0.0 else str(self.diagonal)
        return f"{name}+{self.corrections}" if self.corrections else name

    def __repr__(self) -> str:
        diagonal = repr(self.diagonal)
        if isinstance(self.diagonal, Spaced):
            diagonal = repr(str(self.diagonal))
        elif isinstance(self.diagonal, float) and not self.diagonal:
            diagonal = "'ft-bptt'"
        return f"Feedback({diagonal}, corrections={self.corrections})" if self.corrections else f"Feedback({diagonal})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Feedback) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, int]:
        plain: object = self.diagonal
        if isinstance(plain, Tensor):
            plain = tuple(plain.shape), tuple(plain.flatten().tolist())
        return plain, self.corrections


FeedbackLike: TypeAlias = Feedback | str | float | Tensor | None


def _warn_if_divergent(rule: Feedback) -> None:
    if isinstance(rule.diagonal, Tensor):
        largest = float(rule.diagonal.abs().max()) if rule.diagonal.numel() else 0.0
    elif isinstance(rule.diagonal, float):
        largest = abs(rule.diagonal)
    elif isinstance(rule.diagonal, Spaced):
        largest = rule.diagonal.largest
    else:
        largest = 1.0 if rule.diagonal == "dsf" else 0.0
    if rule.corrections and largest > _DIVERGES_ABOVE:
        warnings.warn(
            f'feedback "{rule}" adds corrections to a fixed diagonal of up to {largest:g}: they grow like binom(T, k) '
            'until k is near T; "calibrated+1" is the stationary rule that takes corrections well',
            stacklevel=3,
        )


def _parse(spelling: str) -> tuple[str | float | Spaced, int]:
    match = re.fullmatch(r"(?P<name>.+?)(?:\+(?P<k>\d+))?", spelling.strip())
    name, k = (match["name"], int(match["k"] or 0)) if match else ("", 0)
    if name in NAMES:
        return name, k
    spaced = re.fullmatch(r"(ramp|log_spaced)\((.+)\)", name)
    try:
        bound = float(spaced[2] if spaced else name)
    except ValueError:
        raise ValueError(f"feedback must be {_SPELLINGS}, each with an optional suffix +k, got {spelling!r}") from None
    return (_spaced(spaced[1], bound) if spaced else bound), k


def _spaced(name: str, bound: float) -> Spaced:
    if name == "ramp" and not 0 < bound <= 1:
        raise ValueError(f"the cap of a feedback ramp must lie above 0 and be at most 1, got {bound}")
    if name == "log_spaced" and not 1 < bound < math.inf:
        raise ValueError(f"the longest horizon of a log-spaced feedback must be above 1 step, got {bound}")
    return Spaced(name, float(bound))


def _normalise(diagonal: object) -> str | float | Tensor | Spaced:
    if diagonal is None:
        return "bptt"
    if isinstance(diagonal, Spaced):
        return "dsf" if diagonal == ("ramp", 1.0) else diagonal
    if isinstance(diagonal, str):
        return 0.0 if diagonal == "ft-bptt" else diagonal
    if isinstance(diagonal, Tensor):
        if diagonal.dim() not in (1, 2) or not diagonal.is_floating_point():
            raise ValueError(
                "a feedback diagonal must be a real floating-point tensor of shape (S,) or (L * directions, S), got "
                f"{diagonal.dtype} of shape {tuple(diagonal.shape)}"
            )
        if not bool(torch.isfinite(diagonal).all()):
            raise ValueError("a feedback diagonal must be finite, got a tensor with NaN or infinity")
        return diagonal.detach().clone()
    if isinstance(diagonal, numbers.Real) and not isinstance(diagonal, bool):
        if not math.isfinite(diagonal):
            raise ValueError(f"a feedback diagonal must be finite, got {diagonal}")
        return float(diagonal)
    raise TypeError(f"feedback must be {_SPELLINGS}, got {type(diagonal).__name__}")
