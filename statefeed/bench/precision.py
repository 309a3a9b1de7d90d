"""Precision of float32 products on a GPU: one switch for cuBLAS and cuDNN, and its current value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# torch has two sets of switches for one state. After a call of a new setter (fp32_precision) that an old one does not
# support, the old getters (allow_tf32, get_float32_matmul_precision) raise, also inside torch.compile, cudnn.flags and
# the profiler. The old setters change both sets, so they are called first, and then the new ones with the same values.


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether cuBLAS and cuDNN may compute float32 products in TF32, and restore the settings afterwards.

    Inside, no getter of torch raises, old or new. Afterwards every getter returns its previous value; a getter that
    raised before, because old and new setters were mixed, may return a value.

    Args:
        allowed: True for TF32 (10 bits of mantissa), False for float32 throughout.

    Example:
        >>> with tf32(False):
        ...     torch.backends.cudnn.allow_tf32, torch.backends.cudnn.rnn.fp32_precision
        (False, 'ieee')
    """
    with _restored():
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed
        *gpu, cpu = _switches()
        for switch in gpu:
            switch.fp32_precision = "tf32" if allowed else "ieee"
        cpu.fp32_precision = "none"  # bfloat16, as "medium" has it, would contradict the others
        yield


@contextlib.contextmanager
def onednn_bfloat16() -> Iterator[None]:
    """Let oneDNN compute float32 products of a CPU in bfloat16, and restore the settings afterwards.

    Getters work as within ``tf32``. torch has no old setter for the CPU only: inside, cuBLAS may use TF32.
    """
    with _restored():
        torch.set_float32_matmul_precision("medium")
        yield


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Restore every setting on exit."""
    switches, cudnn = _switches(), torch.backends.cudnn
    precisions = [switch.fp32_precision for switch in switches]
    # An old getter raises if only a new setter was used.
    old_matmul = _answer(torch.get_float32_matmul_precision, "high" if precisions[0] == "tf32" else "highest")
    old_cudnn = _answer(lambda: cudnn.allow_tf32, precisions[1] == "tf32")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old_matmul)
        torch.backends.cudnn.allow_tf32 = old_cudnn
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision


def _switches() -> list[Any]:
    """Objects with a precision setting: products on a GPU, cuDNN's layers and convolutions, products on a CPU."""
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.cudnn.rnn, backends.cudnn.conv, backends.mkldnn.matmul]


def _answer(getter: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return getter()
    except RuntimeError:
        return otherwise


def flags() -> dict[str, str | bool]:
    """All settings that determine whether a float32 product on a GPU is computed in TF32.

    Returns:
        name -> value, or ``"mixed"`` where an old getter raises because old and new setters were mixed.
    """
    backends: Any = torch.backends
    getters: dict[str, Callable[[], Any]] = {
        "cuda.matmul.fp32_precision": lambda: backends.cuda.matmul.fp32_precision,
        "cuda.matmul.allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
        "cudnn.rnn.fp32_precision": lambda: backends.cudnn.rnn.fp32_precision,
        "cudnn.conv.fp32_precision": lambda: backends.cudnn.conv.fp32_precision,
        "cudnn.allow_tf32": lambda: backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision,
    }
    return {name: _answer(getter, "mixed") for name, getter in getters.items()}
