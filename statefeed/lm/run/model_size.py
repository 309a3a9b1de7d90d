"""Whether a model fits the memory there is, before any of it is allocated."""

import dataclasses
import os

import torch

from statefeed.lm.config import Model
from statefeed.lm.errors import UsageError
from statefeed.lm.model import LanguageModel

_FLOAT32 = 4  # bytes


def check_fits(recipe: Model, vocabulary: int, device: torch.device, processes: int = 1) -> None:
    """Check that the weights alone fit the memory of the device.

    Args:
        recipe: of the model.
        vocabulary: V, types of tokens.
        device: that holds the weights.
        processes: that share them.

    Raises:
        UsageError: when they do not.
    """
    there = _memory(device)
    try:
        one, two = (_parameters(dataclasses.replace(recipe, layers=layers), vocabulary) for layers in (1, 2))
        needed = _FLOAT32 * (one + (recipe.layers - 1) * (two - one)) // processes
    except (RuntimeError, OverflowError):  # a size beyond 64 bits
        needed = None
    if needed is None or (there is not None and needed > there):
        size = "more bytes than 64 bits can count" if needed is None else f"{needed / 2**30:,.1f} GiB"
        memory = "" if there is None else f", and {device.type} has {there / 2**30:,.1f} GiB"
        raise UsageError(
            f"the weights of model.width={recipe.width} and model.layers={recipe.layers} with {vocabulary:,} types of "
            f"tokens take {size}{memory}: lower model.width, model.layers or data.vocabulary"
        )


def _parameters(recipe: Model, vocabulary: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(recipe, vocabulary).parameters())


def _memory(device: torch.device) -> int | None:
    """The bytes of memory of a device, None where the system does not report them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
