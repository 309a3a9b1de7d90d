"""The fused CPU kernels: built at first use, never at import; where they are not to be had, torch does the work."""

from __future__ import annotations

import functools
import os
import warnings


def available() -> bool:
    """Whether the fused kernels can be used; builds and loads them at the first call.

    ``STATEFEED_KERNELS=off`` answers no, ``on`` raises RuntimeError where the answer would be no; otherwise a no warns
    once, with the reason.
    """
    return unavailable() is None


def unavailable() -> str | None:
    """Why the fused kernels cannot be used, None if they can; builds and loads them at the first call."""
    return _unavailable()


# What torch.compiler.assume_constant_result sets; the decorator itself would import all of dynamo with statefeed.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _unavailable() -> str | None:
    wish = os.environ.get("STATEFEED_KERNELS", "auto")
    if wish not in ("auto", "on", "off"):
        raise ValueError(f"STATEFEED_KERNELS must be on, off or auto, not {wish!r}")
    if wish == "off":
        return "STATEFEED_KERNELS is off"
    from statefeed.kernels.build import load

    reason = load()
    if reason is not None and wish == "on":
        raise RuntimeError(f"STATEFEED_KERNELS is on, but the CPU kernels cannot be used: {reason}")
    if reason is not None:
        warnings.warn(f"the CPU kernels cannot be used, torch does their work: {reason}", RuntimeWarning, stacklevel=2)
    return reason
