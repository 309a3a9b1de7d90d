"""Owns the order in which tokens are read: columns of continuous text, cut into steps of one context."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100  # torch's own mark for targets that enter no loss


class Stream:
    """A split laid out in B columns of continuous text, so that the state of one step is the start of the next.

    Args:
        tokens: ids, int32 (N,).
        batch: B, the number of columns.
        context: T, the rows of one step.
        whole: False drops what does not fill a step, as training does; True predicts every token but the first exactly
            once and marks the places that are left over with `IGNORED`, as scoring does.

    >>> [(x.T.tolist(), y.T.tolist()) for x, y in Stream(np.arange(8, dtype=np.int32), batch=2, context=2)]
    [([[0, 1], [3, 4]], [[1, 2], [4, 5]])]
    """

    def __init__(self, tokens: NDArray[np.int32], batch: int, context: int, whole: bool = False) -> None:
        predicted = len(tokens) - 1
        self.context = context
        self.whole = whole
        self.rows = -(-predicted // batch) if whole else predicted // batch
        size = self.rows * batch
        ids = torch.from_numpy(tokens)
        self._inputs = _columns(ids[:-1], size, 0, batch)
        self._targets = _columns(ids[1:], size, IGNORED, batch)

    def __len__(self) -> int:
        """Steps in one pass."""
        return -(-self.rows // self.context) if self.whole else self.rows // self.context

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of one step after the other, both int64 (T, B)."""
        for step in range(len(self)):
            rows = slice(step * self.context, (step + 1) * self.context)
            yield self._inputs[rows].long(), self._targets[rows].long()


def _columns(ids: Tensor, size: int, fill: int, batch: int) -> Tensor:
    """The first `size` ids as (rows, batch), column after column, filled up where there are fewer."""
    filled = torch.nn.functional.pad(ids[:size], (0, max(0, size - len(ids))), value=fill)
    return filled.view(batch, -1).t().contiguous()
