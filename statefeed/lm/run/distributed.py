"""Process groups of a distributed job: the sequences and weights of each process, and collectives."""

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

_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def job_size() -> int:
    """Number of processes of the job, from torchrun's environment variables; 1 without them.

    Raises:
        UsageError: WORLD_SIZE describes several processes, and another variable of torchrun is missing.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    require(size.isdecimal() and int(size) > 0, "WORLD_SIZE in the environment must be a number of processes", size)
    missing = [name for name in _TORCHRUN if name not in os.environ]
    require(
        int(size) == 1 or not missing,
        f"WORLD_SIZE={size} in the environment needs the other variables of torchrun: start the job with torchrun, or "
        "unset WORLD_SIZE",
        f"no {', '.join(missing)}",
    )
    return int(size)


class Group:
    """The processes that `torchrun` started, or this process alone.

    Every process creates every batch, computes its part of the sequences, and takes the same optimizer steps: after
    `reduce_gradients` the gradients are those of the whole batch. Each process has all weights (DDP: gradients are
    summed once per step) or a shard of each weight (FSDP2: weights are gathered block by block when they are used, and
    gradients are summed in the backward pass).

    Args:
        rank: rank of this process.
        size: number of processes.
        device: device of this process.
        sharded: whether weights are sharded.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, sharded: bool = False) -> None:
        self.rank, self.size, self.device, self.sharded = rank, size, device or torch.device("cpu"), sharded

    @classmethod
    @contextmanager
    def join(cls, recipe: Train) -> Iterator["Group"]:
        """Context manager of the group that torchrun's environment variables describe: NCCL on GPUs, otherwise gloo.

        Raises:
            UsageError: the device is not available, there are fewer GPUs than processes, or the environment describes
                a job that torchrun did not start.
        """
        size, device = job_size(), resolve_device(recipe.device)
        if size == 1:
            yield cls(device=device)
            return
        backend = "gloo"
        if device.type == "cuda":
            index, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            require(index < available, "a job needs a GPU for every process of a machine", f"{available} GPUs")
            device, backend = torch.device("cuda", index), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
        distributed.init_process_group(backend, timeout=timedelta(minutes=30))
        try:
            yield cls(distributed.get_rank(), size, device, recipe.parallel == "fsdp")
        finally:
            distributed.destroy_process_group()

    def distribute(self, model: LanguageModel) -> LanguageModel:
        """Move a model to the device, and shard its weights if the group is sharded."""
        model.to(self.device)
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(self.device.type, (self.size,))
            for module in (*model.blocks, model):
                sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
                sharded.set_gradient_divide_factor(
                    1.0
                )  # a sum: each loss is already divided by the size of the whole batch
                sharded.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
            register_fsdp_forward_method(model, "loss")
        return model

    def columns(self, total: int, parts: int) -> list[slice]:
        """The columns of a batch that this process computes, in parts; parts may be empty.

        Args:
            total: number of sequences of the batch.
            parts: number of parts per process.

        >>> Group(1, 2).columns(8, 2), Group(1, 2).columns(3, 1)
        ([slice(4, 6, None), slice(6, 8, None)], [slice(2, 3, None)])
        """
        size, more = divmod(total, self.size * parts)
        ends = [(i + 1) * size + min(i + 1, more) for i in range(self.size * parts)]
        pairs = list(zip([0, *ends], ends, strict=False))
        return [slice(*pair) for pair in pairs[self.rank * parts : (self.rank + 1) * parts]]

    def has_shard(self, part: slice) -> bool:
        """Whether this process runs the model on a part; sharded, also on an empty one, as others need its weights."""
        return part.start < part.stop or self.sharded

    def reduce_gradients(self, model: nn.Module, nats: Tensor, fraction: float) -> Tensor:
        """Sum gradients and losses over all processes in one collective, and average the tensors of learned rules.

        Args:
            model: its gradients are replaced by the sums; sharded gradients are already summed.
            nats: loss of this process.
            fraction: fraction of the sequences of the step that this process has computed.

        Returns:
            The sum of ``nats`` over all processes.

        Raises:
            PeerLost: another process has ended.
        """
        if self.size == 1:
            return nats
        parameters = [] if self.sharded else list(model.parameters())
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        learned = learned_state(model).values()
        means = [value for value in learned if value.is_floating_point()]
        flat = torch.cat([part.flatten() for part in (*parts, *(mean * fraction for mean in means), nats.view(1))])
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
        """Sum numbers over all processes, on the CPU.

        Raises:
            PeerLost: another process has ended.
        """
        if self.size == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        with self.guard_collectives():
            distributed.all_reduce(sums)
        return tuple(sums.tolist())

    def gather(self, parts: Sequence[list[State]]) -> list[State]:
        """Gather the states of all sequences from all processes, in the order of the batch.

        Args:
            parts: the states of this process: one list per part, with one state per block.
        """
        return [self._gather_state(blocks) for blocks in zip(*parts, strict=True)]

    def _gather_state(self, states: Sequence[State]) -> State:
        if not isinstance(states[0], Tensor):
            return tuple(self._gather_state(part) for part in zip(*states, strict=True))
        local = states[0] if len(states) == 1 else torch.cat(list(states), 1)
        if self.size == 1:
            return local
        gathered = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self.guard_collectives():
            distributed.all_gather(gathered, local.contiguous())
        return torch.cat(gathered, 1)

    def shard(self, states: Iterable[State], columns: slice) -> list[State]:
        """The states of the given columns, on the device of this process: the inverse of `gather`."""
        return [
            s[:, columns].to(self.device)
            if isinstance(s, Tensor)
            else tuple(part[:, columns].to(self.device) for part in s)
            for s in states
        ]

    def barrier(self) -> None:
        """Wait for all processes.

        Raises:
            PeerLost: another process has ended.
        """
        self.all_reduce_sum(0.0)

    @contextmanager
    def guard_collectives(self) -> Iterator[None]:
        """Context manager that turns the failure of a collective into PeerLost.

        Raises:
            PeerLost: a collective inside failed because another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.search(r"gloo|nccl|connection|socket", str(error), re.IGNORECASE):
                raise
            raise PeerLost(f"process {self.rank} of {self.size}: another process of the job ended") from error


def shard_batch(batch: Batch, columns: slice) -> Batch:
    """The given columns of a batch; for an empty slice, one column whose targets are all `IGNORED`."""
    if columns.start == columns.stop:
        ignored = torch.full_like(batch.targets[:, :1], IGNORED)
        return shard_batch(batch, slice(0, 1))._replace(targets=ignored)
    lengths = None if batch.lengths is None else batch.lengths[columns]
    return Batch(batch.inputs[:, columns], batch.targets[:, columns], lengths, batch.is_start)


@torch.no_grad()
def gather_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Full tensors on the CPU, gathered one at a time if sharded; all processes must call this.

    Args:
        tensors: tensors by name; sharded ones in every process.
        keep: whether this process needs the result; the others get an empty dictionary.
    """
    gathered = ((name, _full_tensor(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if keep}


def _full_tensor(tensor: Tensor) -> Tensor:
    sharded: Any = tensor.detach()
    full: Tensor = sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded
    return full


def distribute_like(full: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a full tensor with the device and the sharding of another tensor."""
    if not hasattr(tensor, "placements"):
        return full.to(tensor.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    shard = distribute_tensor(full.to(tensor.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
    return shard.clone()


def finite(model: nn.Module, group: Group) -> bool:
    """Whether all weights of all processes are finite."""
    parts = [getattr(p, "to_local", p.detach)() for p in model.parameters()]
    return group.all_reduce_sum(float(sum(not bool(part.isfinite().all()) for part in parts))) == (0.0,)
