"""Times of one layer under several rules, measured in turns."""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from statefeed.busy import OtherLoad
from statefeed.feedback import Feedback
from statefeed.stack import RecurrentStack

_REPEATS = 5
_COMPARED = ("bptt", "dsf")


class Timing(NamedTuple):
    """Time of a forward and backward pass.

    Attributes:
        rule: the feedback rule; ``"torch"`` is torch.nn's own layer.
        seconds: median of the runs.
        times_faster: than the last of the rules, torch.nn's own layer if there is one: median, least and largest over
            the turns.
    """

    rule: str
    seconds: float
    times_faster: tuple[float, float, float]


class Timings(NamedTuple):
    """Times of a layer under its rule, under ``"bptt"`` and ``"dsf"``, and through torch.nn's own path.

    Attributes:
        rules: in the order of the runs, the layer's own rule first and the baseline last.
        other_load: processors that other processes used meanwhile; None where that is not known.
    """

    rules: tuple[Timing, ...]
    other_load: float | None


def time_rules(layer: RecurrentStack, x: Tensor | PackedSequence) -> Timings:
    """Run copies of a layer forward and backward, in turns.

    Args:
        layer: any layer with a cell; it and the generators of random numbers stay as they are.
        x: its input, of which the gradient is computed, too.
    """
    baseline = "torch" if layer.feedback_cell.torch_forward is not None else "bptt"
    wanted = [str(layer.feedback), *_COMPARED]
    rules = {name: Feedback(name) if name != str(layer.feedback) else layer.feedback for name in wanted}
    rules = {name: rule for name, rule in rules.items() if layer.unsupported_reason(rule) is None and name != baseline}
    rules[baseline] = Feedback(baseline)
    copies = {name: copy.deepcopy(layer) for name in rules}
    seconds: dict[str, list[float]] = {name: [] for name in rules}
    load = OtherLoad()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for name, rule in rules.items():
            if rule.exact:
                stack.enter_context(copies[name].exact_rule())
            if str(copies[name].feedback) != name:
                copies[name].feedback = rule
            if name == str(layer.feedback):
                copies[name].forward_method = layer.forward_method
        for repeat in range(1 + _REPEATS):
            for name, module in copies.items():
                took = seconds_of(module, x)
                if repeat:
                    seconds[name].append(took)
    found = []
    for name, own in seconds.items():
        ratios = [base / took for base, took in zip(seconds[baseline], own, strict=True)]
        found.append(Timing(name, statistics.median(own), (statistics.median(ratios), min(ratios), max(ratios))))
    return Timings(tuple(found), load.processors())


def seconds_of(layer: RecurrentStack, x: Tensor | PackedSequence) -> float:
    """Time of one forward and backward pass."""
    leaf = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
    differentiated = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    start = clock(leaf)
    with torch.enable_grad():
        y, _ = layer(x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf)
        total = (y.data if isinstance(y, PackedSequence) else y).sum()
    torch.autograd.grad(total, differentiated)
    return clock(leaf) - start


def clock(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
