"""The processes of one job: the sequences that each reads, the weights that it holds, and their collectives."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from statefeed.lm.config import Train
from statefeed.lm.data.batches import IGNORED, Batch
from statefeed.lm.errors import PeerLost, require
from statefeed.lm.model import LanguageModel, State
from statefeed.lm.model.learned import learned_state
from statefeed.lm.run.device import resolve_device


class Group:
    """The processes that `torchrun` started, or this one alone.

    Every process makes every batch, reads its own sequences of it, and takes the same steps: after `reduce_gradients`
    the gradients are those of the whole batch. Each process has all weights (gradients are summed once a step), or a
    shard of each (FSDP2: weights are gathered block by block as they are used, gradients summed in the backward pass).

    Args:
        rank: of this process, from 0.
        size: number of processes.
        device: of this process.
        sharded: whether each has a shard of the weights only.
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
        size, device = int(os.environ.get("WORLD_SIZE", 1)), resolve_device(recipe.device)
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
        """The model on the device, its weights sharded over the processes where they are to be."""
        model.to(self.device)
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(self.device.type, (self.size,))
            for module in (*model.blocks, model):
                sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
                sharded.set_gradient_divide_factor(1.0)  # a sum, as every share is part of the whole batch's mean
                sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
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

    def has_shard(self, part: slice) -> bool:
        """Whether this process runs the model on a part: on an empty one only where others need its weights."""
        return part.start < part.stop or self.sharded

    def reduce_gradients(self, model: nn.Module, nats: Tensor, share: float) -> Tensor:
        """Sum gradients and losses over all processes, in one message, and average the state of learned rules.

        Args:
            model: its gradients become those of all processes together; sharded ones are already.
            nats: of this process.
            share: of the sequences of the step that this process has read.

        Raises:
            PeerLost: when another process has ended.
        """
        if self.size == 1:
            return nats
        parameters = [] if self.sharded else list(model.parameters())
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        learned = learned_state(model).values()
        means = [value for value in learned if value.is_floating_point()]
        flat = torch.cat([part.flatten() for part in (*parts, *(mean * share for mean in means), nats.view(1))])
        with self.guard_collectives():
            distributed.all_reduce(flat)
            for count in learned:
                if not count.is_floating_point():
                    distributed.broadcast(count, 0)
        *sums, nats = torch.split(flat, [part.numel() for part in (*parts, *means, nats.view(1))])
        for parameter, total in zip(parameters, sums, strict=False):
            parameter.grad = total.view_as(parameter)
        for mean, total in zip(means, sums[len(parameters) :], strict=True):
            mean.copy_(total.view_as(mean))
        return nats.squeeze(0)

    def all_reduce_sum(self, *numbers: float) -> tuple[float, ...]:
        """The sums of some numbers over all processes; none of them waits for a GPU.

        Raises:
            PeerLost: when another process has ended.
        """
        if self.size == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        with self.guard_collectives():
            distributed.all_reduce(sums)
        return tuple(sums.tolist())

    def gather(self, parts: Sequence[list[State]]) -> list[State]:
        """The states of all sequences of all processes, in their order.

        Args:
            parts: those of this process, one list a part, each with one state a block.
        """
        return [self._gather_state(blocks) for blocks in zip(*parts, strict=True)]

    def _gather_state(self, states: Sequence[State]) -> State:
        if not isinstance(states[0], Tensor):
            return tuple(self._gather_state(part) for part in zip(*states, strict=True))
        own = states[0] if len(states) == 1 else torch.cat(list(states), 1)
        if self.size == 1:
            return own
        gathered = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self.guard_collectives():
            distributed.all_gather(gathered, own.contiguous())
        return torch.cat(gathered, 1)

    def shard(self, states: Iterable[State], columns: slice) -> list[State]:
        """The states of some of the sequences, on the device: the inverse of `gather`."""
        return [
            s[:, columns].to(self.device)
            if isinstance(s, Tensor)
            else tuple(part[:, columns].to(self.device) for part in s)
            for s in states
        ]

    def barrier(self) -> None:
        """Wait for all processes.

        Raises:
            PeerLost: when another one has ended.
        """
        self.all_reduce_sum(0.0)

    @contextmanager
    def guard_collectives(self) -> Iterator[None]:
        """Raise PeerLost where a collective inside fails because another process has ended.

        Raises:
            PeerLost: in that case.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.search(r"gloo|nccl|connection|socket", str(error), re.IGNORECASE):
                raise
            raise PeerLost(f"process {self.rank} of {self.size}: another process of the job ended") from error


def shard_batch(batch: Batch, columns: slice) -> Batch:
    """Some of the sequences of a batch; of an empty part, one without a target that counts."""
    if columns.start == columns.stop:
        nothing = torch.full_like(batch.targets[:, :1], IGNORED)
        return shard_batch(batch, slice(0, 1))._replace(targets=nothing)
    lengths = None if batch.lengths is None else batch.lengths[columns]
    return Batch(batch.inputs[:, columns], batch.targets[:, columns], lengths, batch.is_start)


@torch.no_grad()
def gather_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors on the CPU, sharded ones gathered one at a time; every process has to call this.

    Args:
        tensors: by name; sharded ones in every process.
        keep: whether this process wants them; the others get nothing.
    """
    gathered = ((name, _full_tensor(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if keep}


def _full_tensor(tensor: Tensor) -> Tensor:
    sharded: Any = tensor.detach()
    full: Tensor = sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded
    return full


def distribute_like(full: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a full tensor, on the device of another one and sharded as that is."""
    if not hasattr(tensor, "placements"):
        return full.to(tensor.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    own = distribute_tensor(full.to(tensor.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
    return own.clone()


def finite(model: nn.Module, group: Group) -> bool:
    """Whether all weights of all processes are numbers."""
    parts = [getattr(p, "to_local", p.detach)() for p in model.parameters()]
    return group.all_reduce_sum(float(sum(not bool(part.isfinite().all()) for part in parts))) == (0.0,)
