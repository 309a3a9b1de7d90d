"""The fused CPU kernels: built at first use, never at import; where they are not to be had, torch does the work."""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple


def available() -> bool:
    """Whether the fused kernels can be used; builds and loads them at the first call.

    ``STATEFEED_KERNELS=off`` answers no, ``on`` raises RuntimeError where the answer would be no; otherwise a no warns
    once, with the reason.
    """
    return unavailable() is None


def unavailable() -> str | None:
    """Why the fused kernels cannot be used, None if they can; builds and loads them at the first call."""
    return _loaded().reason


# What torch.compiler.assume_constant_result sets; the decorator itself would import all of dynamo with statefeed.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def described() -> str:
    """Which library is loaded, for which CPUs it was compiled, and on how many threads it runs."""
    import torch

    threads = torch.get_num_threads()
    return f"{_loaded().library}, {threads} thread{'s' if threads > 1 else ''}"


class _Loaded(NamedTuple):
    library: str
    reason: str | None


@functools.cache
def _loaded() -> _Loaded:
    wish = os.environ.get("STATEFEED_KERNELS", "auto")
    if wish not in ("auto", "on", "off"):
        raise ValueError(f"STATEFEED_KERNELS must be on, off or auto, not {wish!r}")
    if wish == "off":
        return _Loaded("none", "STATEFEED_KERNELS is off")
    from statefeed.kernels.build import load

    try:
        return _Loaded(load(), None)
    except (OSError, RuntimeError) as error:
        why = f"the CPU kernels cannot be used: {error}"
        if wish == "on":
            raise RuntimeError(f"STATEFEED_KERNELS is on, but {why}") from error
        warnings.warn(f"torch does the work of the kernels: {why}", RuntimeWarning, stacklevel=2)
        return _Loaded("none", str(error))
