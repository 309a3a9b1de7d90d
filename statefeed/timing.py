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

from statefeed.busy import OtherLoad, describe, is_busy
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
        faster_than_bptt: the layer's own rule compared with ``"bptt"``, in the form of ``times_faster``.
    """

    rules: tuple[Timing, ...]
    other_load: float | None
    faster_than_bptt: tuple[float, float, float]

    def conclusion(self, exact: bool) -> str | None:
        """What the times say against the layer's own rule.

        Args:
            exact: whether the rule is exact; otherwise it is compared with ``"bptt"`` too.

        Returns:
            That the rule is slower, or why the times allow no conclusion; None if it is faster.
        """
        own, baseline = self.rules[0], self.rules[-1].rule
        compared = {"torch.nn": own.times_faster} if baseline == "torch" and own.rule != "torch" else {}
        if not exact:
            compared['"bptt", which is exact'] = self.faster_than_bptt
        if not compared:
            return None
        again = "no conclusion can be drawn: measure again on a quiet machine"
        if is_busy(self.other_load):
            return f"{describe(self.other_load).partition(';')[0]}; {again}"
        for name, (median, least, largest) in compared.items():
            if largest < 1:
                return f"slower than {name}, here: {1 / median:.2f} times its time"
            if least <= 1:
                return f"{least:.2f} to {largest:.2f} times faster than {name}; {again}"
        return None


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
    found = tuple(
        Timing(name, statistics.median(own), _times_faster(seconds[baseline], own)) for name, own in seconds.items()
    )
    bptt = seconds.get("bptt", seconds[baseline])  # an exact rule other than "bptt" is the baseline
    return Timings(found, load.processors(), _times_faster(bptt, seconds[str(layer.feedback)]))


def _times_faster(than: list[float], own: list[float]) -> tuple[float, float, float]:
    """Median, least and largest ratio over the turns."""
    ratios = [other / took for other, took in zip(than, own, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def seconds_of(layer: RecurrentStack, x: Tensor | PackedSequence) -> float:
    """Time of one forward and backward pass."""
    leaf = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
    differentiated = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    start = clock(leaf)
    with torch.enable_grad():
        result = layer(x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf)
        # A subclass may return its outputs alone; PackedSequence is a tuple too.
        y = result if isinstance(result, (Tensor, PackedSequence)) else result[0]
        total = (y.data if isinstance(y, PackedSequence) else y).sum()
    torch.autograd.grad(total, differentiated)
    return clock(leaf) - start


def clock(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
