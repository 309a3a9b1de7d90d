"""Availability of the fused kernels; they are built and loaded at first use, never at import."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple


def available(device: str = "cpu") -> bool:
    """Whether the fused kernels of a device can be used; the first call loads them.

    With ``STATEFEED_KERNELS=off`` they are not used. With ``auto``, the default, one warning is issued if they are
    unavailable.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        RuntimeError: ``STATEFEED_KERNELS=on`` and they cannot be used.
        ValueError: ``STATEFEED_KERNELS`` is not on, off or auto.
    """
    return unavailable(device) is None


def unavailable(device: str = "cpu") -> str | None:
    """Why the fused kernels of a device cannot be used; None if they can. Loads and raises as ``available``."""
    return load(device).reason


# The attribute set by torch.compiler.assume_constant_result, whose import would load all of dynamo with statefeed.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def described(device: str = "cpu") -> str:
    """Description of the loaded kernels; on a CPU with their instruction set and the number of threads."""
    if device != "cpu":
        return load(device).library
    import torch

    threads = torch.get_num_threads()
    return f"{load(device).library}, {threads} thread{'s' if threads > 1 else ''}"


class Loaded(NamedTuple):
    """The kernels of a device: a description of their library, and why they are unavailable, or None."""

    library: str
    reason: str | None


@functools.cache
def load(device: str) -> Loaded:
    """Load the kernels of a device once; raises as ``available``."""
    setting = os.environ.get("STATEFEED_KERNELS", "auto")
    if setting not in ("auto", "on", "off"):
        raise ValueError(f"STATEFEED_KERNELS must be on, off or auto, got {setting!r}")
    if setting == "off":
        return Loaded("none", "STATEFEED_KERNELS is off")
    try:
        return Loaded(_LOADERS[device](), None)
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"the {device.upper()} kernels cannot be used: {error}"
        if setting == "on":
            raise RuntimeError(f"STATEFEED_KERNELS is on, but {reason}") from error
        from statefeed.user_warning import warn

        warn(
            f"statefeed uses plain torch operations instead of its kernels: {reason}; "
            '"bptt" is then torch\'s own path, no faster',
            RuntimeWarning,
        )
        return Loaded("none", str(error))


def _load_cpu() -> str:
    from statefeed.native.build import load

    return load()


def _load_cuda() -> str:
    from statefeed.native.triton_probe import probe

    return probe()


_LOADERS = {"cpu": _load_cpu, "cuda": _load_cuda}
