"""Context manager that restores what a pass changes in a model: rules, modes, buffers, hidden state, generators."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from statefeed.mixin import FeedbackLayer

# Attributes of every module: parameters, submodules, hooks. Buffers are restored separately.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore a model after the block, including hidden state that a module stores between calls.

    Hidden state is searched in attributes: tensors and generators, and lists, tuples and dictionaries of them. The
    generators of torch, Python and numpy are restored too.
    """
    modules = list(model.modules())
    modes = [(m, m.training) for m in modules]
    rules = [(m, m.feedback) for m in modules if isinstance(m, FeedbackLayer)]
    attributes = [(m, {k: v for k, v in vars(m).items() if k not in _OF_EVERY_MODULE}) for m in modules]
    buffers = [(m, dict(m._buffers)) for m in modules]
    seen: set[int] = set()
    restore = [undo for _, values in (*attributes, *buffers) for undo in _restorers(list(values.values()), seen)]
    restore += _generator_restorers()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for layer, rule in rules:
                layer.feedback = rule
            for module, values in attributes:
                for name in set(vars(module)) - set(values) - _OF_EVERY_MODULE:
                    del vars(module)[name]
                vars(module).update(values)
            for module, values in buffers:
                module._buffers.clear()
                module._buffers.update(values)
            with torch.no_grad():
                for undo in restore:
                    undo()


def _restorers(values: list[Any], seen: set[int]) -> Iterator[Callable[[], object]]:
    """Functions that restore the current contents of tensors, generators, lists and dictionaries."""
    for value in values:
        if id(value) in seen or isinstance(value, nn.Parameter):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor) and not value.is_meta:
            yield _tensor_restorer(value)
        elif isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, dict):
            yield _mapping_restorer(value)
            yield from _restorers(list(value.values()), seen)
        elif isinstance(value, (list, deque)):
            yield _sequence_restorer(value)
            yield from _restorers(list(value), seen)
        elif isinstance(value, tuple):
            yield from _restorers(list(value), seen)


def _generator_restorers() -> Iterator[Callable[[], object]]:
    """Functions that restore the current state of the generators of Python and, if imported, numpy."""
    yield partial(random.setstate, random.getstate())
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        yield partial(numpy.random.set_state, numpy.random.get_state())


def _tensor_restorer(tensor: Tensor) -> Callable[[], None]:
    was = tensor.detach().clone()

    def undo() -> None:
        # An in-place write invalidates a graph that saved the tensor, so write only if a value changed.
        if not torch.equal(tensor, was):
            tensor.copy_(was)

    return undo


def _mapping_restorer(mapping: dict[Any, Any]) -> Callable[[], None]:
    was = dict(mapping)

    def undo() -> None:
        # Mappings that cannot be changed, or not by these methods, are common: write only if the contents changed.
        if not _same((*mapping, *mapping.values()), (*was, *was.values())):
            mapping.clear()
            mapping.update(was)

    return undo


def _sequence_restorer(sequence: list[Any] | deque[Any]) -> Callable[[], None]:
    was = list(sequence)

    def undo() -> None:
        if not _same(tuple(sequence), tuple(was)):
            sequence.clear()
            sequence.extend(was)

    return undo


def _same(values: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether two tuples have the same objects, which tensors cannot be asked by ``==``."""
    return len(values) == len(others) and all(value is other for value, other in zip(values, others, strict=True))
