"""The calls that torch's own layers run faster than the CPU kernels: a fixed table, not a timing."""

from __future__ import annotations


def torch_is_faster(T: int) -> str | None:
    """Why torch's own layer runs a call faster than the kernels; None if it does not.

    Args:
        T: steps.
    """
    if T == 1:
        return "one step has no recurrence to fuse, and torch's own path costs less per call"
    return None
