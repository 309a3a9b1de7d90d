"""Recurrent networks trained without sequential backpropagation through time: the public API."""

from statefeed.alignment import Agreement, Alignment, Lags, Monitor, alignment
from statefeed.cell_layer import CellLayer
from statefeed.custom import Recurrent
from statefeed.explain import Explanation, explain
from statefeed.feedback import Feedback
from statefeed.layers import GRU, LSTM, RNN
from statefeed.mixin import FeedbackLayer
from statefeed.newton import Newton
from statefeed.scan import diagonal_scan
from statefeed.schedule import Schedule
from statefeed.swap import SwapReport, restore, swap

__version__ = "0.2.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
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

# Pickles and documents use the public import path, so that files can move.
for _name in __all__:
    globals()[_name].__module__ = "statefeed"
del _name
