"""The class ``Feedback``: the diagonal that approximates the state Jacobian, and the number of corrections.

delta_0[t] = e[t] + D[t+1] * delta_0[t+1]
delta_k    = scan_D(e + shift((J - D)^T delta_{k-1}))          k corrections; k = T is exact for every D
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from statefeed.cells.protocol import Cell
from statefeed.feedback.exact import Exact
from statefeed.feedback.fixed import Constant, Given, LogSpaced, Ramp
from statefeed.feedback.protocol import Context, Diagonal, KernelRule
from statefeed.feedback.spelling import parse, spellings
from statefeed.user_warning import warn

# Above this a stationary diagonal with corrections grows like binom(T, k) before it converges at k near T.
_DIVERGES_ABOVE = 0.9
_GROWS_ABOVE = 1 + 1e-6
_CORRECTIONS = 2**31  # more than any sequence has steps
_RENAMED = {"bptt": "torch", "fused-bptt": "bptt"}


@dataclass(frozen=True, repr=False)
class Feedback:
    """Rule for the gradient of a recurrent state.

    ``delta[t] = e[t] + D[t+1] * delta[t+1]`` followed by k corrections ``delta_k = scan_D(e + shift((J - D)^T
    delta_{k-1}))``; k = 0 is the cheapest, k = T is backpropagation through time for every D (Caillon, Fagnou and
    Allauzen, arXiv 2503.23104, for k = 0 and a fixed D).

    Args:
        diagonal: D, in any of its spellings.

            - ``None`` or ``"bptt"``: exact, through statefeed's kernels if they support the input, else through torch's
              own path; ``explain`` reports which.
            - ``"torch"``: exact, through torch's own layer in every case, which supports double backward and
              ``torch.func.jacrev`` as torch.nn does.
            - ``"ft-bptt"`` or ``0.0``: D = 0, fully truncated.
            - ``"dsf"``: linspace(0, 1, S), fixed; for an LSTM over the concatenated states (h, c), S = 2H,
              for an SLSTM over (h, c, n), S = 3H.
            - ``"ramp(cap)"`` and ``"log_spaced(longest)"``: see ``Feedback.ramp`` and ``Feedback.log_spaced``.
            - a float, or a tensor of shape (S,): that diagonal, fixed. A tensor (L * directions, S) has one row per
              layer and direction, like ``layer.diagonal`` of the next two rules.
            - ``"calibrated"``: the running mean of diag(J[t]), updated in training.
            - ``"fitted"``: the least-squares fit a of g[t] - e[t] = a * g[t+1] for every unit, where g is the exact
              state gradient: ``a = sum (g[t] - e[t]) g[t+1] / sum g[t+1]^2``. In training, the first and then every
              50th backward pass under this diagonal is exact BPTT and updates the fit. A layer keeps its fit and its
              count of passes under other rules, and ``"fitted+k"`` shares them.
            - ``"gate"``: the direct path, z[t] of a GRU, f[t] on c and 0 on h of an LSTM, f[t] on c and n of
              an SLSTM; an RNN has none.
            - ``"jacobian"``: diag(J[t]).

            A string may end in the suffix ``+k``: ``"gate+1"``. The table of rules is ``statefeed.feedback.DIAGONALS``.
            An instance of a user-defined ``Diagonal`` is accepted too.
        corrections: k, the number of corrections, each one batched matrix product over all steps.

    Gradient: exact for ``"bptt"``, ``"torch"`` and k >= T; approximate otherwise. The forward pass is exact under
        every rule.

    Raises:
        ValueError: an unknown spelling, a diagonal that is not finite, or a negative k.
        TypeError: a diagonal of another type.

    Warns:
        UserWarning: corrections around a fixed diagonal near 1, which diverge until k is near T; a fixed diagonal above
            1, under which gradients grow with every step.

    Cost: O(S) per step for k = 0; each correction adds 2 * T * B * H * G * H flops. An exact pass of ``"fitted"`` is a
        loop over time and takes about as long as torch's own backward pass.

    Example:
        >>> Feedback("gate+1")
        Feedback('gate', corrections=1)
        >>> Feedback(0.0) == Feedback("ft-bptt")
        True
        >>> str(Feedback(0.5, corrections=2))
        '0.5+2'
    """

    diagonal: Diagonal
    corrections: int = 0

    def __init__(self, diagonal: Diagonal | str | float | Tensor | None, corrections: int = 0) -> None:
        suffix = 0
        value: object = diagonal
        if isinstance(diagonal, str):
            value, suffix = parse(diagonal)
        if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
            raise ValueError(f"corrections must be a whole number >= 0, got {corrections!r}")
        if max(suffix, corrections) >= _CORRECTIONS:
            raise ValueError(f"corrections must be below 2^31, got {max(suffix, corrections)}")
        if suffix and corrections:
            raise ValueError(f"corrections are given twice: as the suffix +{suffix} and as corrections={corrections}")
        object.__setattr__(self, "diagonal", _diagonal(value))
        object.__setattr__(self, "corrections", suffix or corrections)
        if self.exact and self.corrections:
            raise ValueError(f'feedback "{diagonal}" is exact and takes no corrections, got {self.corrections}')
        if self.corrections and self.diagonal.largest > _DIVERGES_ABOVE:
            warn(
                f'feedback "{self}" adds corrections to a fixed diagonal of up to {self.diagonal.largest:g}: they grow '
                'like binom(T, k) until k is near T; "calibrated+1" is the stationary rule that takes corrections well'
            )
        elif self.diagonal.largest > _GROWS_ABOVE:
            warn(
                f'feedback "{self}" has a fixed diagonal of up to {self.diagonal.largest:g}: above 1 the gradient '
                "grows with every step that it passes; expected values up to 1"
            )

    @classmethod
    def ramp(cls, cap: float, corrections: int = 0) -> Feedback:
        """Create the rule D = linspace(0, cap, S), the ramp of DSF with a largest value below 1.

        Args:
            cap: largest value, above 0 and at most 1; 1 is ``"dsf"``. For an LSTM the ramp covers the concatenated
                states (h, c).
            corrections: k, the number of corrections.

        Returns:
            The rule.

        Raises:
            ValueError: cap is not above 0 and at most 1.

        Example:
            >>> str(Feedback.ramp(0.95)), Feedback.ramp(1) == Feedback("dsf")
            ('ramp(0.95)', True)
        """
        return cls(Ramp(cap), corrections)

    @classmethod
    def log_spaced(cls, longest: float, corrections: int = 0) -> Feedback:
        """Create the rule D = 1 - 1 / h, with horizons h geometrically spaced from 1 to ``longest`` steps.

        A unit with the value d assigns credit over about 1 / (1 - d) steps; here as many units do so over 1 to 2 steps
        as over 32 to 64 steps.

        Args:
            longest: horizon of the last unit in steps, above 1. For an LSTM the units are those of the concatenated
                states (h, c).
            corrections: k, the number of corrections.

        Returns:
            The rule.

        Raises:
            ValueError: longest is not above 1.

        Example:
            >>> Feedback.log_spaced(100).stationary(3, torch.float32, torch.device("cpu"))
            tensor([0.0000, 0.9000, 0.9900])
        """
        return cls(LogSpaced(longest), corrections)

    @property
    def exact(self) -> bool:
        """Whether the gradient is that of BPTT: ``"bptt"`` or ``"torch"``."""
        return self.diagonal.exact

    @property
    def through_torch(self) -> bool:
        """Whether the rule selects torch's own layer even if kernels support the input."""
        return isinstance(self.diagonal, Exact) and self.diagonal.through_torch

    @property
    def learned(self) -> bool:
        """Whether the diagonal is learned in training."""
        return self.diagonal.learned

    def stationary(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The diagonal of shape (size,) if it is known in advance, else None.

        Args:
            size: S, the width of the state; 2H for the states (h, c) of an LSTM.
            dtype: dtype of the returned tensor.
            device: device of the returned tensor.

        Returns:
            D of shape (size,), or None for learned, time-varying and exact rules.

        Example:
            >>> Feedback("dsf").stationary(3, torch.float32, torch.device("cpu"))
            tensor([0.0000, 0.5000, 1.0000])
        """
        return self.diagonal.vector(size, dtype, device)

    def row(self, k: int) -> Feedback:
        """The rule of one layer and direction: this rule, or one with row k of its diagonal.

        Args:
            k: index of the layer and direction, ``layer * directions + direction``.

        Returns:
            The rule.

        Example:
            >>> Feedback(torch.tensor([[0.5], [0.25]])).row(1)
            Feedback(tensor([0.2500]))
        """
        diagonal = self.diagonal.row(k)
        if diagonal is self.diagonal:
            return self
        rule = object.__new__(Feedback)
        object.__setattr__(rule, "diagonal", diagonal)
        object.__setattr__(rule, "corrections", self.corrections)
        return rule

    def resolve(self, context: Context) -> KernelRule:
        """The rule in the form that backends receive.

        Args:
            context: the inputs from which a rule computes its diagonal.

        Returns:
            The rule of one layer and direction for one backward pass.

        Raises:
            ValueError: a user-defined diagonal has not one value per unit of the state.
        """
        rule = self.diagonal.resolve(context)
        if rule.diagonal is not None and rule.diagonal.shape[-1:] != (context.size,):
            raise ValueError(
                f'feedback "{self.diagonal}" must compute one value per unit of the state, {context.size} here, got '
                f"{tuple(rule.diagonal.shape)}"
            )
        return rule._replace(corrections=self.corrections)

    def unsupported_reason(self, cell: Cell | None, size: int, rows: int) -> str | None:
        """Why a layer does not support this rule.

        Args:
            cell: the cell; None in ``statefeed.Recurrent``, where only its step function is known.
            size: S, the width of the state.
            rows: number of layers times number of directions.

        Returns:
            The reason in one sentence; None if the layer supports the rule.
        """
        return self.diagonal.unsupported_reason(cell, size, rows)

    def __setstate__(self, state: dict[str, Any]) -> None:
        diagonal = state["diagonal"]
        if not isinstance(diagonal, Diagonal):  # a pickle of version 0.1, in which "bptt" was torch's own layer
            diagonal = _diagonal(parse(_RENAMED.get(diagonal, diagonal))[0] if isinstance(diagonal, str) else diagonal)
        self.__dict__.update(state, diagonal=diagonal)

    def __str__(self) -> str:
        return f"{self.diagonal}+{self.corrections}" if self.corrections else str(self.diagonal)

    def __repr__(self) -> str:
        diagonal = repr(self.diagonal.values) if isinstance(self.diagonal, Given) else _plain(self.diagonal)
        return f"Feedback({diagonal}, corrections={self.corrections})" if self.corrections else f"Feedback({diagonal})"


FeedbackLike: TypeAlias = Feedback | Diagonal | str | float | Tensor | None


def as_feedback(rule: FeedbackLike) -> Feedback:
    """Convert a rule in any spelling to a ``Feedback``."""
    return rule if isinstance(rule, Feedback) else Feedback(rule)


def check_keyword_only(layer: str, arguments: Sequence[object]) -> None:
    """Raise where a rule stands among the positional arguments of a layer.

    Args:
        layer: name of its class.
        arguments: input_size, hidden_size, num_layers and so on.

    Raises:
        TypeError: for a rule, or text in place of num_layers.
    """
    for place, value in enumerate(arguments):
        if isinstance(value, Feedback | Diagonal) or (isinstance(value, str) and (place == 2 or _is_rule(value))):
            raise TypeError(
                f"feedback must be a keyword argument, {layer}(..., feedback={str(value)!r}): got it as the positional "
                f"argument {place + 1}"
            )


def _is_rule(spelling: str) -> bool:
    try:
        parse(spelling)
    except (TypeError, ValueError):
        return False
    return True


def _diagonal(value: object) -> Diagonal:
    if value is None:
        return Exact()
    if isinstance(value, Diagonal):
        return value
    if isinstance(value, Tensor):
        return Given(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return Constant(float(value))
    hint = ""
    if type(value).__name__ == "Schedule":
        hint = ": apply a schedule in the training loop, schedule.apply(model, step / steps)"
    if isinstance(value, type) and issubclass(value, Diagonal):
        hint = f": give an instance, {value.__name__}(...)"
    raise TypeError(f"feedback must be {spellings()}, got {type(value).__name__}{hint}")


def _plain(diagonal: Diagonal) -> str:
    return str(diagonal.value) if isinstance(diagonal, Constant) and diagonal.value else repr(str(diagonal))
