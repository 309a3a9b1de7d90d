"""Fixed table of calls that torch's own layers run faster than the CPU kernels."""

from __future__ import annotations


def torch_is_faster(T: int) -> str | None:
    """Why torch's own layer is faster than the kernels; None if it is not.

    Args:
        T: number of steps.

    Returns:
        The reason in one sentence, or None.
    """
    if T == 1:
        return "one step has no recurrence to fuse, and torch's own path costs less per call"
    return None
