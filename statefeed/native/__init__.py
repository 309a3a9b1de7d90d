"""Whether the fused kernels of a device can be used; builds and loads them at first use, never at import."""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple


def available(device: str = "cpu") -> bool:
    """Whether the fused kernels of a device, ``"cpu"`` or ``"cuda"``, can be used; loads them at the first call.

    With ``STATEFEED_KERNELS=off`` they cannot. With ``auto``, the default, one warning says why they cannot.

    Raises:
        RuntimeError: ``STATEFEED_KERNELS=on`` and they cannot be used.
        ValueError: ``STATEFEED_KERNELS`` is none of on, off, auto.
    """
    return unavailable(device) is None


def unavailable(device: str = "cpu") -> str | None:
    """Why the fused kernels of a device cannot be used, None if they can; otherwise like ``available``."""
    return _load(device).reason


# What torch.compiler.assume_constant_result sets; the decorator itself would import all of dynamo with statefeed.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def described(device: str = "cpu") -> str:
    """Which kernels are loaded; on a CPU, also their instruction set and the number of threads."""
    if device != "cpu":
        return _load(device).library
    import torch

    threads = torch.get_num_threads()
    return f"{_load(device).library}, {threads} thread{'s' if threads > 1 else ''}"


class _Loaded(NamedTuple):
    library: str
    reason: str | None


@functools.cache
def _load(device: str) -> _Loaded:
    setting = os.environ.get("STATEFEED_KERNELS", "auto")
    if setting not in ("auto", "on", "off"):
        raise ValueError(f"STATEFEED_KERNELS must be on, off or auto, not {setting!r}")
    if setting == "off":
        return _Loaded("none", "STATEFEED_KERNELS is off")
    try:
        return _Loaded(_LOADERS[device](), None)
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"the {device.upper()} kernels cannot be used: {error}"
        if setting == "on":
            raise RuntimeError(f"STATEFEED_KERNELS is on, but {reason}") from error
        warnings.warn(f"torch does the work of the kernels: {reason}", RuntimeWarning, stacklevel=2)
        return _Loaded("none", str(error))


def _load_cpu() -> str:
    from statefeed.native.build import load

    return load()


def _load_cuda() -> str:
    from statefeed.native.triton_probe import probe

    return probe()


_LOADERS = {"cpu": _load_cpu, "cuda": _load_cuda}
