"""Recurrent networks trained without sequential backpropagation through time: the public API."""

import importlib
import sys
import types
import typing

if typing.TYPE_CHECKING:
    from statefeed.agreement import Agreement
    from statefeed.alignment import Alignment, Monitor, alignment
    from statefeed.cell_layer import CellLayer
    from statefeed.custom import Recurrent
    from statefeed.explain import Explanation, explain
    from statefeed.feedback import Feedback
    from statefeed.lags import Lags
    from statefeed.layers import GRU, LSTM, RNN
    from statefeed.mixin import FeedbackLayer
    from statefeed.newton import Newton
    from statefeed.scan import diagonal_scan
    from statefeed.schedule import Schedule
    from statefeed.slstm import SLSTM
    from statefeed.swap import SwapReport, restore, swap

__version__ = "0.2.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "Agreement",
    "Alignment",
    "CellLayer",
    "Explanation",
    "Feedback",
    "FeedbackLayer",
    "Lags",
    "Monitor",
    "Newton",
    "Recurrent",
    "Schedule",
    "SwapReport",
    "alignment",
    "diagonal_scan",
    "explain",
    "restore",
    "swap",
]

_MODULES = (
    "agreement",
    "alignment",
    "cell_layer",
    "custom",
    "explain",
    "feedback",
    "lags",
    "layers",
    "mixin",
    "newton",
    "scan",
    "schedule",
    "slstm",
    "swap",
)


class _Package(types.ModuleType):
    """This package; the first use of a public name imports them all, and torch with them.

    The command line parses its arguments without torch, which takes seconds to import.
    """

    def __getattr__(self, name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for module in _MODULES:
            for public, value in vars(importlib.import_module(f"{__name__}.{module}")).items():
                if public in __all__:
                    value.__module__ = __name__  # pickles and documents use the public path, so that files can move
                    super().__setattr__(public, value)
        return vars(self)[name]

    def __setattr__(self, name: str, value: object) -> None:
        # An import binds a submodule to its name here, but alignment, explain and swap are functions of the API.
        if not (isinstance(value, types.ModuleType) and name in __all__):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
