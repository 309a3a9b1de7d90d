"""Memory checks of launches in Triton's interpreter: random program order, bounds, and races.

A launch is wrong if an access leaves the elements of its tensor arguments (their gaps included), if an address is
written twice, if one program writes what another reads, or if a program reads what this launch wrote.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class MemoryErrorFound(AssertionError):
    """What a launch did wrong."""


class Buffer:
    """One storage: the elements that are arguments of the launch, and the programs that read or wrote each."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.itemsize, self.start = tensor.element_size(), storage.data_ptr()
        count = storage.nbytes() // self.itemsize
        self.valid = np.zeros(count, bool)
        self.reader, self.writer = np.full(count, NOBODY), np.full(count, NOBODY)

    def add(self, tensor: torch.Tensor) -> None:
        assert tensor.element_size() == self.itemsize, "two dtypes in one storage"
        index = torch.arange(len(self.valid)).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        self.valid[index.numpy()] = True


class Checker:
    """Checks of one process; ``launches`` and ``programs`` count the checked ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.launches = self.programs = self.accesses = 0
        self.buffers: list[Buffer] = []

    def begin(self, arguments: list[Any]) -> None:
        by_start: dict[int, Buffer] = {}
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                start = tensor.untyped_storage().data_ptr()
                by_start.setdefault(start, Buffer(tensor)).add(tensor)
        self.buffers = list(by_start.values())
        self.launches += 1

    def order(self, programs: int) -> None:
        self.permutation = list(range(programs))
        self.random.shuffle(self.permutation)
        self.programs += programs

    def elements(self, addresses: np.ndarray, size: int) -> Iterator[tuple[Buffer, np.ndarray]]:
        left = np.ones(len(addresses), bool)
        for buffer in self.buffers:
            offset = addresses.astype(np.int64) - buffer.start
            in_buffer = (offset >= 0) & (offset < len(buffer.valid) * buffer.itemsize) & left
            if in_buffer.any():
                left &= ~in_buffer
                index = offset[in_buffer] // buffer.itemsize
                if (
                    size != buffer.itemsize
                    or (offset[in_buffer] % buffer.itemsize).any()
                    or not buffer.valid[index].all()
                ):
                    raise MemoryErrorFound("an access is out of bounds: between the elements of an argument")
                yield buffer, index
        if left.any():
            raise MemoryErrorFound("an access is out of bounds: in no argument")

    def read(self, addresses: np.ndarray, size: int) -> None:
        for buffer, index in self.elements(addresses, size):
            if (buffer.writer[index] != NOBODY).any():
                raise MemoryErrorFound("a program reads what this launch wrote")
            before = buffer.reader[index]
            buffer.reader[index] = np.where((before == NOBODY) | (before == self.program), self.program, SEVERAL)
        self.accesses += len(addresses)

    def write(self, addresses: np.ndarray, size: int) -> None:
        for buffer, index in self.elements(addresses, size):
            if len(np.unique(index)) < len(index) or (buffer.writer[index] != NOBODY).any():
                raise MemoryErrorFound("an address is written twice")
            if not np.isin(buffer.reader[index], (NOBODY, self.program)).all():
                raise MemoryErrorFound("one program writes what another reads")
            buffer.writer[index] = self.program
        self.accesses += len(addresses)


@contextmanager
def checked(seed: int) -> Iterator[Checker]:
    """Check all launches inside the context."""
    checker, builder, executor = Checker(seed), interpreter.interpreter_builder, interpreter.GridExecutor
    arguments, dimensions, place = executor._init_args_hst, builder.set_grid_dim, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store

    def copied(self: Any, args: Any, kwargs: Any) -> Any:
        found = arguments(self, args, kwargs)
        checker.begin([*found[0], *found[1].values()])
        return found

    def sized(nx: int, ny: int, nz: int) -> None:
        dimensions(nx, ny, nz)
        checker.grid = (nx, ny, nz)
        checker.order(nx * ny * nz)

    def placed(x: int, y: int, z: int) -> None:
        _, ny, nz = checker.grid
        checker.program = checker.permutation[(x * ny + y) * nz + z]
        place(checker.program // (ny * nz), checker.program // nz % ny, checker.program % nz)

    def addresses(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        size = max(np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize, 1)
        where = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        return pointers.data[where].ravel(), size

    def loaded(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        checker.read(*addresses(pointers, mask))
        return load(pointers, mask, *rest, **named)

    def stored(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        checker.write(*addresses(pointers, mask))
        return store(pointers, value, mask, *rest, **named)

    executor._init_args_hst = copied
    builder.set_grid_dim, builder.set_grid_idx = sized, placed
    builder.create_masked_load, builder.create_masked_store = loaded, stored
    try:
        yield checker
    finally:
        executor._init_args_hst = arguments
        builder.set_grid_dim, builder.set_grid_idx = dimensions, place
        builder.create_masked_load, builder.create_masked_store = load, store
