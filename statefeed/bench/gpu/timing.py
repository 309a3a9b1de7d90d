"""Timing of a forward and backward pass on a GPU: pipelined passes, a CUDA graph, and the host time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statefeed.bench.measure import Seconds, clock, interleaved, spread

# Target duration in seconds of one measurement of pipelined passes, and its maximum number of passes.
_WINDOW, _MOST_PASSES = 0.025, 20


class Work(NamedTuple):
    """A forward pass, and the backward pass of its result."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any]

    def run(self) -> None:
        """Run both passes without waiting for the device."""
        self.backward(self.forward())


def measure(
    work: Mapping[str, Work], rounds: int, device: str, without_graph: Container[str] = ()
) -> dict[str, dict[str, Any]]:
    """Time several ways to do the same work, alternately.

    Args:
        work: name -> the work to time; at least one.
        rounds: measurements of each.
        device: cuda, or cpu, for which only the time of consecutive passes is measured.
        without_graph: names of work for which no CUDA graph is captured: a failed capture breaks later ones.

    Returns:
        name -> ``ms``, ``forward_ms``, ``backward_ms`` of a pass, medians with their spread, and its ``peak_bytes``;
        ``graph_ms`` of the same pass replayed by a CUDA graph, or ``graph_failed``; ``host_ms``, the time in which
        the host queues a pass; or only ``failed``.
    """
    found: dict[str, dict[str, Any]] = {}
    passes: dict[str, int] = {}
    for name, item in work.items():
        try:
            item.run()  # warm-up: compiles and loads the kernels
            found[name] = {"peak_bytes": peak_bytes(item.run, device)}
            start = clock(device)
            item.run()
            passes[name] = max(1, min(_MOST_PASSES, int(_WINDOW / (clock(device) - start))))
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
    ready = [name for name in work if name in passes]
    eager = interleaved({name: lambda n=name: _passes(work[n], passes[n], device) for name in ready}, rounds)  # type: ignore[misc]
    for name, seconds in eager.items():
        forward, backward = zip(*seconds, strict=True)
        found[name] |= {
            "ms": spread([1e3 * (f + b) for f, b in seconds]),
            "forward_ms": spread([1e3 * f for f in forward]),
            "backward_ms": spread([1e3 * b for b in backward]),
            "passes": passes[name],
        }
    _ratios(found, eager, "times_faster_than")
    if device == "cuda":
        host = interleaved({name: lambda n=name: _host(work[n]) for name in ready}, rounds)  # type: ignore[misc]
        for name, seconds in host.items():
            found[name]["host_ms"] = spread([1e3 * s for (s,) in seconds])
        graphs = {}
        for name in (name for name in ready if name not in without_graph):
            try:
                graphs[name] = capture(work[name].run)
            except Exception as error:
                found[name]["graph_failed"] = f"{type(error).__name__}: {error}"
        replayed = interleaved({n: lambda n=n: replays(graphs[n], passes[n]) for n in graphs}, rounds)  # type: ignore[misc]
        for name, seconds in replayed.items():
            found[name]["graph_ms"] = spread([1e3 * s for (s,) in seconds])
        _ratios(found, replayed, "graph_times_faster_than")
    return found


def _ratios(found: dict[str, dict[str, Any]], seconds: Mapping[str, list[Seconds]], key: str) -> None:
    """Speed-up of every contender over the first, per measurement."""
    if not seconds or (first := next(iter(found))) not in seconds:
        return
    baseline = [sum(phases) for phases in seconds[first]]
    for name, turns in seconds.items():
        ratios = [b / sum(phases) for b, phases in zip(baseline, turns, strict=True)]
        found[name][key] = {first: spread(ratios)}


def _passes(work: Work, count: int, device: str) -> Seconds:
    """Seconds of one forward and one backward pass, from consecutively queued passes."""
    if device == "cpu":
        start = clock(device)
        y = work.forward()
        middle = clock(device)
        work.backward(y)
        return middle - start, clock(device) - middle
    events = [_event() for _ in range(2 * count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for k in range(count):
        y = work.forward()
        events[2 * k + 1].record()
        work.backward(y)
        events[2 * k + 2].record()
    torch.cuda.synchronize()
    milliseconds = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return 1e-3 * sum(milliseconds[::2]) / count, 1e-3 * sum(milliseconds[1::2]) / count


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _host(work: Work) -> Seconds:
    """Seconds in which the host queues one pass on an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work.run()
    return (time.perf_counter() - start,)


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the work that the call queues.

    Raises:
        RuntimeError: the work cannot be captured, for example because it waits for the device.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def replays(graph: torch.cuda.CUDAGraph, count: int) -> Seconds:
    """Seconds of one replay of a CUDA graph, from consecutively queued replays."""
    start, stop = _event(), _event()
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return (1e-3 * start.elapsed_time(stop) / count,)


def peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """Peak GPU memory of a call in bytes, above the memory allocated before; None on a CPU."""
    if device == "cpu":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
