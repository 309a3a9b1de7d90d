"""Precision of float32 products: the backward pass uses the precision of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# torch's own annotations lack these settings.
_CUDNN_RNN: Any = torch.backends.cudnn.rnn
_MKLDNN: Any = torch.backends.mkldnn


def forward_precision() -> str:
    """``"tf32"`` if cuDNN's RNNs run float32 in TF32 now (torch's default), else ``"ieee"``."""
    return "tf32" if _CUDNN_RNN.fp32_precision == "tf32" else "ieee"


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Run float32 matrix products on CUDA in ``"tf32"`` or ``"ieee"``; ``""`` uses cuDNN's current setting.

    torch stores the setting twice, and raises if one copy is read while the two disagree. Inside the context both
    copies are set through the switch that writes both, and on exit both are restored. If they already disagreed,
    because the user set only one of them, only ``fp32_precision``, which torch's products read, is switched.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if (before == "tf32") == ((precision or forward_precision()) == "tf32"):
        yield
        return
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = ""
    one_dnn = _MKLDNN.matmul.fp32_precision
    if not legacy:
        matmul.fp32_precision = "ieee" if before == "tf32" else "tf32"
    elif before == "tf32":
        torch.set_float32_matmul_precision("highest")  # allow_tf32 alone would disagree with oneDNN's setting
    else:
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        if legacy:
            torch.set_float32_matmul_precision(legacy)
            _MKLDNN.matmul.fp32_precision = one_dnn
        matmul.fp32_precision = before
