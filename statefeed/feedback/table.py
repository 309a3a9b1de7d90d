"""Table of rules: the diagonal of every name that a spelling can begin with."""

from __future__ import annotations

from collections.abc import Callable

from statefeed.feedback.exact import Exact
from statefeed.feedback.fixed import Constant, LogSpaced, Ramp
from statefeed.feedback.learned import Calibrated, Fitted
from statefeed.feedback.protocol import Diagonal
from statefeed.feedback.time_varying import Gate, Jacobian

# A spelling is "name" or "name(number)"; the number is the argument.
DIAGONALS: dict[str, Callable[..., Diagonal]] = {
    "bptt": Exact,
    "torch": lambda: Exact(through_torch=True),
    "ft-bptt": lambda: Constant(0.0),
    "dsf": lambda: Ramp(1.0),
    "ramp": Ramp,
    "log_spaced": LogSpaced,
    "calibrated": Calibrated,
    "fitted": Fitted,
    "gate": Gate,
    "jacobian": Jacobian,
}


class Spaced:
    """Name of a class in pickles of version 0.1; creates the current ramp or log-spaced diagonal."""

    def __new__(cls, name: str, bound: float) -> Diagonal:  # type: ignore[misc]
        return DIAGONALS[name](bound)
