"""Owns the processes of one job: which sequences each reads, which weights it holds, the sums that make them one."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from statefeed.lm.config import Train, require
from statefeed.lm.data.batches import IGNORED, Batch
from statefeed.lm.model.language_model import LanguageModel, State
from statefeed.lm.run.device import chosen
from statefeed.lm.run.endings import Lost


class Group:
    """The processes that `torchrun` started, or this one alone.

    Every process makes every batch, takes its own sequences of it, and takes the same steps: after `sum` the gradients
    are those of the whole batch. Either each has all weights (one sum of all gradients a step), or its part of each
    (FSDP2: weights come together block by block as they are used, gradients are summed on the way back).

    Args:
        rank: of this process, from 0.
        size: number of processes.
        device: of this process.
        sharded: whether each has its part of the weights only.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, sharded: bool = False) -> None:
        self.rank, self.size, self.device, self.sharded = rank, size, device or torch.device("cpu"), sharded

    @classmethod
    @contextmanager
    def join(cls, recipe: Train) -> Iterator["Group"]:
        """The group that the environment describes, left at the end: through NCCL on GPUs, one a process, else gloo.

        Raises:
            UsageError: when there is no such device, or fewer GPUs than processes.
        """
        size, device = int(os.environ.get("WORLD_SIZE", 1)), chosen(recipe.device)
        if size == 1:
            yield cls(device=device)
            return
        backend = "gloo"
        if device.type == "cuda":
            place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            require(place < there, "a job needs a GPU for every process of a machine", f"{there} GPUs")
            device, backend = torch.device("cuda", place), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
        distributed.init_process_group(backend, timeout=timedelta(minutes=30))
        try:
            yield cls(distributed.get_rank(), size, device, recipe.parallel == "fsdp")
        finally:
            distributed.destroy_process_group()

    def place(self, model: LanguageModel) -> LanguageModel:
        """The model on the device, its weights cut into the parts of the processes where they are sharded."""
        model.to(self.device)
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(self.device.type, (self.size,))
            for module in (*model.blocks, model):
                sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
                sharded.set_gradient_divide_factor(1.0)  # a sum, as every share is part of the whole batch's mean
                sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            register_fsdp_forward_method(model, "loss")
        return model

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

    def takes(self, part: slice) -> bool:
        """Whether this process runs the model on a part: on an empty one only to hold its weights out to the others."""
        return part.start < part.stop or self.sharded

    def sum(self, model: nn.Module, nats: Tensor, share: float) -> Tensor:
        """Sum gradients and nats over all processes, in one message; averages the buffers of calibrated rules.

        Args:
            model: its gradients become those of all processes together; sharded ones are already.
            nats: of this process.
            share: of the sequences of the step that this process has read.

        Raises:
            Lost: when another process is gone.
        """
        if self.size == 1:
            return nats
        parameters = [] if self.sharded else list(model.parameters())
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        means = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        flat = torch.cat([part.flatten() for part in (*parts, *(mean * share for mean in means), nats.view(1))])
        with self.peers():
            distributed.all_reduce(flat)
            for buffer in model.buffers():
                if not buffer.is_floating_point():
                    distributed.broadcast(buffer, 0)
        *sums, nats = torch.split(flat, [part.numel() for part in (*parts, *means, nats.view(1))])
        for parameter, total in zip(parameters, sums, strict=False):
            parameter.grad = total.view_as(parameter)
        for mean, total in zip(means, sums[len(parameters) :], strict=True):
            mean.copy_(total.view_as(mean))
        return nats.squeeze(0)

    def total(self, *numbers: float) -> tuple[float, ...]:
        """The sums of some numbers over all processes; none of them waits for a GPU.

        Raises:
            Lost: when another process is gone.
        """
        if self.size == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        with self.peers():
            distributed.all_reduce(sums)
        return tuple(sums.tolist())

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
        with self.peers():
            distributed.all_gather(gathered, own.contiguous())
        return torch.cat(gathered, 1)

    def part(self, states: Iterable[State], columns: slice) -> list[State]:
        """The states of some of the sequences, on the device: what `whole` puts together."""
        return [
            s[:, columns].to(self.device)
            if isinstance(s, Tensor)
            else tuple(part[:, columns].to(self.device) for part in s)
            for s in states
        ]

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            Lost: when another one is gone.
        """
        self.total(0.0)

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Say so where what is done inside together with the other processes fails because one of them is gone.

        Raises:
            Lost: in that case.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.search(r"gloo|nccl|connection|socket", str(error), re.IGNORECASE):
                raise
            raise Lost(f"process {self.rank} of {self.size}: another process of the job ended") from error


def part_of(batch: Batch, columns: slice) -> Batch:
    """Some of the sequences of a batch; of an empty part, one of which nothing counts."""
    if columns.start == columns.stop:
        nothing = torch.full_like(batch.targets[:, :1], IGNORED)
        return part_of(batch, slice(0, 1))._replace(targets=nothing)
    lengths = None if batch.lengths is None else batch.lengths[columns]
    return Batch(batch.inputs[:, columns], batch.targets[:, columns], lengths, batch.fresh)


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, put together from the parts of all processes, which all have to call this."""
    sharded: Any = tensor.detach()
    whole: Tensor = sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded
    return whole


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a tensor that `full` has put together, on the device of another and cut as that is."""
    if not hasattr(tensor, "placements"):
        return whole.to(tensor.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    cut = distribute_tensor(whole.to(tensor.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
    return cut.clone()


def finite(model: nn.Module, group: Group) -> bool:
    """Whether all weights of all processes are numbers."""
    parts = [getattr(p, "to_local", p.detach)() for p in model.parameters()]
    return group.total(float(sum(not bool(part.isfinite().all()) for part in parts))) == (0.0,)
