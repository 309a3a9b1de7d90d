"""Owns the processes of one job: which sequences each reads, and the sums that make them one training."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from statefeed.lm.batches import Batch
from statefeed.lm.endings import Lost
from statefeed.lm.model import State


class Group:
    """The processes that `torchrun` started, or this one alone.

    Every process makes every batch and takes its own sequences of it, has all weights, and takes the same steps: after
    `sum` the gradient of each is that of the whole batch.

    Args:
        rank: of this process, from 0.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    @contextmanager
    def join(cls) -> Iterator["Group"]:
        """The group that the environment describes, left at the end."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            yield cls()
            return
        distributed.init_process_group("gloo", timeout=timedelta(minutes=30))
        try:
            yield cls(distributed.get_rank(), size)
        finally:
            distributed.destroy_process_group()

    def columns(self, total: int, parts: int) -> list[slice]:
        """The sequences of this process, in parts; some are empty where there are fewer sequences than parts.

        Args:
            total: sequences of all processes.
            parts: of every process.

        >>> Group(1, 2).columns(8, 2), Group(1, 2).columns(3, 1)
        ([slice(4, 6, None), slice(6, 8, None)], [slice(2, 3, None)])
        """
        size, more = divmod(total, self.size * parts)
        ends = [(i + 1) * size + min(i + 1, more) for i in range(self.size * parts)]
        pairs = list(zip([0, *ends], ends, strict=False))
        return [slice(*pair) for pair in pairs[self.rank * parts : (self.rank + 1) * parts]]

    def sum(self, model: nn.Module, *numbers: Tensor | float) -> tuple[Tensor | float, ...]:
        """Sum gradients and numbers over all processes, in one message; averages the buffers of calibrated rules.

        Args:
            model: its gradients become those of all processes together.
            numbers: of this process.

        Raises:
            Lost: when another process is gone.
        """
        if self.size == 1:
            return numbers
        parameters = list(model.parameters())
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        means = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        extra = torch.stack([torch.as_tensor(number, dtype=torch.float32).detach() for number in numbers])
        flat = torch.cat([part.flatten() for part in (*parts, *(mean / self.size for mean in means), extra)])
        with self._peers():
            distributed.all_reduce(flat)
            for buffer in model.buffers():
                if not buffer.is_floating_point():
                    distributed.broadcast(buffer, 0)
        *sums, extra = torch.split(flat, [part.numel() for part in (*parts, *means, extra)])
        for parameter, total in zip(parameters, sums, strict=False):
            parameter.grad = total.view_as(parameter)
        for mean, total in zip(means, sums[len(parameters) :], strict=True):
            mean.copy_(total.view_as(mean))
        return tuple(extra.tolist())

    def whole(self, parts: Sequence[list[State]]) -> list[State]:
        """The states of all sequences of all processes, in their order.

        Args:
            parts: those of this process, one list a part, each with one state a block.
        """
        return [self._joined(blocks) for blocks in zip(*parts, strict=True)]

    def _joined(self, states: Sequence[State]) -> State:
        if not isinstance(states[0], Tensor):
            return tuple(self._joined(part) for part in zip(*states, strict=True))
        own = states[0] if len(states) == 1 else torch.cat(list(states), 1)
        if self.size == 1:
            return own
        gathered = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._peers():
            distributed.all_gather(gathered, own.contiguous())
        return torch.cat(gathered, 1)

    def part(self, states: Iterable[State], columns: slice) -> list[State]:
        """The states of some of the sequences: what `whole` puts together."""
        return [s[:, columns] if isinstance(s, Tensor) else tuple(part[:, columns] for part in s) for s in states]

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            with self._peers():
                distributed.barrier()

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise Lost(f"process {self.rank} of {self.size}: another process of the job ended") from error


def part_of(batch: Batch, columns: slice) -> Batch:
    """Some of the sequences of a batch."""
    lengths = None if batch.lengths is None else batch.lengths[columns]
    return Batch(batch.inputs[:, columns], batch.targets[:, columns], lengths, batch.fresh)
