"""Feedback rules: the class ``Feedback``, its spellings, and the table of diagonals with one file per kind."""

from statefeed.feedback.protocol import (
    EXACT,
    Context,
    Diagonal,
    KernelRule,
    Learned,
    LearnedState,
    Linearization,
    Stationary,
    TimeVarying,
)
from statefeed.feedback.table import DIAGONALS, Spaced
from statefeed.feedback.value import Feedback, FeedbackLike, as_feedback

__all__ = [
    "DIAGONALS",
    "EXACT",
    "Context",
    "Diagonal",
    "Feedback",
    "FeedbackLike",
    "KernelRule",
    "Learned",
    "LearnedState",
    "Linearization",
    "Spaced",
    "Stationary",
    "TimeVarying",
    "as_feedback",
]
