"""Base class of layers of other packages that ``swap`` has converted."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import nn

from statefeed.feedback import Feedback
from statefeed.mixin import FeedbackLayer


class ConvertedLayer(FeedbackLayer):
    """Base class of the methods that replace those of another package's class.

    A converted object keeps its attributes, parameters and hooks, and stays an instance of its class.

    Attributes:
        plain_class: the class of the other package, which ``restore`` gives back.
    """

    plain_class: ClassVar[type[nn.Module]]

    @classmethod
    @abstractmethod
    def unsupported_module(cls, module: nn.Module) -> str | None:
        """Why an object of the other package cannot be converted.

        Args:
            module: the object before conversion.

        Returns:
            The reason in one sentence; None if it can.
        """

    def unsupported_reason(self, rule: Feedback) -> str | None:
        """Why the layer does not support a rule, in one sentence; None if it does."""
        if rule.through_torch:
            return f'feedback "torch" needs a layer of torch.nn, which has no {type(self).__name__}: use "bptt"'
        return super().unsupported_reason(rule)

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}, {self.feedback_repr()})"
