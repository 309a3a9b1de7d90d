"""The fused kernels of a device: made at first use, never at import; where there are none, torch does the work."""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple


def available(device: str = "cpu") -> bool:
    """Whether the fused kernels of a device, ``"cpu"`` or ``"cuda"``, can be used; loads them at the first call.

    ``STATEFEED_KERNELS=off`` answers no, ``on`` raises RuntimeError where the answer would be no; otherwise a no warns
    once, with the reason.
    """
    return unavailable(device) is None


def unavailable(device: str = "cpu") -> str | None:
    """Why the fused kernels cannot be used, None if they can; builds and loads them at the first call."""
    return _loaded(device).reason


# What torch.compiler.assume_constant_result sets; the decorator itself would import all of dynamo with statefeed.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def described(device: str = "cpu") -> str:
    """Which library is loaded; on a CPU, for which of them it was compiled, and on how many threads it runs."""
    if device != "cpu":
        return _loaded(device).library
    import torch

    threads = torch.get_num_threads()
    return f"{_loaded(device).library}, {threads} thread{'s' if threads > 1 else ''}"


class _Loaded(NamedTuple):
    library: str
    reason: str | None


@functools.cache
def _loaded(device: str) -> _Loaded:
    wish = os.environ.get("STATEFEED_KERNELS", "auto")
    if wish not in ("auto", "on", "off"):
        raise ValueError(f"STATEFEED_KERNELS must be on, off or auto, not {wish!r}")
    if wish == "off":
        return _Loaded("none", "STATEFEED_KERNELS is off")
    try:
        return _Loaded(_LOAD[device](), None)
    except (ImportError, OSError, RuntimeError) as error:
        why = f"the {device.upper()} kernels cannot be used: {error}"
        if wish == "on":
            raise RuntimeError(f"STATEFEED_KERNELS is on, but {why}") from error
        warnings.warn(f"torch does the work of the kernels: {why}", RuntimeWarning, stacklevel=2)
        return _Loaded("none", str(error))


def _cpu() -> str:
    from statefeed.native.build import load

    return load()


def _cuda() -> str:
    import triton

    return f"Triton {triton.__version__}"


_LOAD = {"cpu": _cpu, "cuda": _cuda}
