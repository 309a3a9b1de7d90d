"""Precision of float32 products: the backward pass follows what the forward pass used."""

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
    """Float32 matrix products on CUDA run in ``"tf32"`` or ``"ieee"`` inside, and as before after; ``""`` asks cuDNN.

    torch holds the setting twice, and raises where one copy is read and the two disagree. So inside, both copies are
    set through the one switch that writes both, and after, both are restored. Where they disagreed before, because the
    user set one of them alone, only ``fp32_precision``, which torch's products read, is switched.
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
