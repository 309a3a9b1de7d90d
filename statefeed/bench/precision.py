"""The precision of float32 products on a GPU: one switch for cuBLAS and cuDNN, and what it is set to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# torch has two sets of switches for one state. After a call of a new setter (fp32_precision) that an old one does not
# know of, the old getters (allow_tf32, get_float32_matmul_precision) raise, also inside torch.compile, cudnn.flags and
# the profiler. The old setters change both sets, so they come first; the new ones then say the same by name.


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether cuBLAS and cuDNN may compute float32 products in TF32, and restore the settings afterwards.

    Inside, every getter of torch answers, old and new. Afterwards every getter answers what it answered before; one
    that raised before, because old and new setters were mixed, may answer then.

    Args:
        allowed: True for TF32 (10 bits of mantissa), False for float32 throughout.

    Example:
        >>> with tf32(False):
        ...     torch.backends.cudnn.allow_tf32, torch.backends.cudnn.rnn.fp32_precision
        (False, 'ieee')
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    named: list[Any] = [matmul, cudnn.rnn, cudnn.conv]  # type: ignore[attr-defined]
    precisions = [switch.fp32_precision for switch in named]
    # An old getter raises where the caller has used a new setter alone.
    old_matmul = _answer(lambda: matmul.allow_tf32, matmul.fp32_precision == "tf32")
    old_cudnn = _answer(lambda: cudnn.allow_tf32, cudnn.rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]
    try:
        _set(named, allowed, allowed, ["tf32" if allowed else "ieee"] * len(named))
        yield
    finally:
        _set(named, old_matmul, old_cudnn, precisions)


def _set(named: list[Any], matmul: bool, cudnn: bool, precisions: list[str]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn
    for switch, precision in zip(named, precisions, strict=True):
        switch.fp32_precision = precision


def _answer(getter: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return getter()
    except RuntimeError:
        return otherwise


def flags() -> dict[str, str | bool]:
    """Every setting that decides whether a float32 product on a GPU is computed in TF32.

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
