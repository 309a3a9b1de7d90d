"""Check of the model argument of the functions that take a model."""

from __future__ import annotations

from torch import nn

SWAP_IS_IN_PLACE = "swap changes the model in place and returns a report: write sf.swap(model) and use model"


def check_model(model: object, call: str) -> None:
    """Raise unless the first argument of a function is a model.

    Args:
        model: the first argument.
        call: how to call the function, for the message.

    Raises:
        TypeError: it is not a torch.nn.Module.

    Example:
        >>> check_model("dsf", "swap(model, feedback)")
        Traceback (most recent call last):
        TypeError: the first argument must be the model, a torch.nn.Module, got str: call swap(model, feedback)
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        remedy = SWAP_IS_IN_PLACE if kind == "SwapReport" else f"call {call}"
        raise TypeError(f"the first argument must be the model, a torch.nn.Module, got {kind}: {remedy}")
