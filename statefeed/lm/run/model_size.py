"""Check that a model fits into memory before it is allocated."""

import dataclasses
import os

import torch

from statefeed.lm.config import Model
from statefeed.lm.errors import UsageError
from statefeed.lm.model import LanguageModel

_FLOAT32 = 4  # bytes


def check_fits(recipe: Model, vocabulary: int, device: torch.device, processes: int = 1) -> None:
    """Check that the weights fit into the memory of the device.

    Args:
        recipe: the model section of a recipe.
        vocabulary: V, the number of types.
        device: device of the weights.
        processes: number of processes that the weights are sharded over.

    Raises:
        UsageError: the weights do not fit.
    """
    available = _memory(device)
    try:
        one, two = (_parameters(dataclasses.replace(recipe, layers=layers), vocabulary) for layers in (1, 2))
        needed = _FLOAT32 * (one + (recipe.layers - 1) * (two - one)) // processes
    except (RuntimeError, OverflowError):  # a size beyond 64 bits
        needed = None
    if needed is None or (available is not None and needed > available):
        size = "more bytes than 64 bits can count" if needed is None else f"{needed / 2**30:,.1f} GiB"
        memory = "" if available is None else f", and {device.type} has {available / 2**30:,.1f} GiB"
        raise UsageError(
            f"the weights of model.width={recipe.width} and model.layers={recipe.layers} with {vocabulary:,} types of "
            f"tokens take {size}{memory}: lower model.width, model.layers or data.vocabulary"
        )


def _parameters(recipe: Model, vocabulary: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(recipe, vocabulary).parameters())


def _memory(device: torch.device) -> int | None:
    """Size of the memory of a device in bytes; None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
