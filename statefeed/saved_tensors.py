"""The tensors that a layer saved for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_OUTPUT_CHANGED = (
    "the output of a recurrent layer was changed in place before the backward pass, as by y *= mask or by ReLU or "
    "Dropout with inplace=True: compute a new tensor, as y = y * mask does"
)


def saved_tensors(ctx: Any) -> Sequence[Tensor]:
    """``ctx.saved_tensors`` of an autograd function whose output is among them.

    Raises:
        RuntimeError: a saved tensor was changed in place, with the remedy if it is the output.
    """
    if torch.compiler.is_compiling():
        return tuple(ctx.saved_tensors)
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if f"of {type(ctx).__name__.removesuffix('Backward')}," in str(error):
            raise RuntimeError(_OUTPUT_CHANGED) from error
        raise
