"""``statefeed bench scan``: time, growth of time with T, and error of the methods of diagonal_scan."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import statefeed as sf
from statefeed.bench.measure import ParityError, Seconds, clock, interleaved, machine_line, spread
from statefeed.bench.options import METHODS as METHODS
from statefeed.bench.options import ScanOptions as Options
from statefeed.bench.options import names, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# Measured peak bytes per element of x, rounded up; the float64 reference alone takes 50.
_BYTES = {"auto": 60, "sequential": 60, "prefix": 60, "fft": 100}
_PARITY = 1e-9
_MARKERS = ("o", "s", "^", "D")  # by method


def problem(T: int, S: int, varying: bool, device: str) -> tuple[Tensor, Tensor]:
    """x (T, S), unit normal; the ramp of "dsf" as a, or one uniform in (0, 1) for every step."""
    torch.manual_seed(0)
    x = torch.randn(T, S, device=device)
    return x, torch.rand(T, S, device=device) if varying else torch.linspace(0, 1, S, device=device)


def largest_error(y: Tensor, exact: Tensor) -> float:
    """The largest error of a unit relative to the largest value of that unit, maximum over units."""
    return float(((y.double() - exact).abs().amax(0) / exact.abs().amax(0)).max())


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure every method, length, width and kind of diagonal.

    Args:
        options: checked options.

    Yields:
        One record each; ``not_run`` gives the reason if the problem does not fit into memory.

    Raises:
        ParityError: the methods disagree in float64; nothing was timed.
    """
    methods = names("methods", options.methods, METHODS)
    lengths = [4, 8] if options.smoke else numbers("steps", options.steps)
    widths = [3] if options.smoke else numbers("widths", options.widths)
    for varying in (False, True):
        check_parity(_allowed(methods, varying), varying, options.device)
    for S, varying in itertools.product(widths, (False, True)):
        shorter: dict[str, tuple[int, float]] = {}
        for T in lengths:
            for record in compare(_allowed(methods, varying), T, S, varying, options):
                if "ms" in record:
                    ms = record["ms"]["median"]
                    if (method := record["method"]) in shorter:
                        T_before, ms_before = shorter[method]
                        record["growth"] = math.log(ms / ms_before) / math.log(T / T_before)
                    shorter[method] = T, ms
                yield record


def _allowed(methods: list[str], varying: bool) -> list[str]:
    return [method for method in methods if not (varying and method == "fft")]


def check_parity(methods: Sequence[str], varying: bool, device: str) -> None:
    """Compare the methods with the sequential one in float64, over 67 steps of 5 units.

    Raises:
        ParityError: a method disagrees.
    """
    x, a = (value.double() for value in problem(67, 5, varying, device))
    exact = sf.diagonal_scan(x, a, reverse=True, method="sequential")
    for method in methods:
        error = largest_error(sf.diagonal_scan(x, a, reverse=True, method=method), exact)
        if not error <= _PARITY:
            raise ParityError(
                f"diagonal_scan by {method} must agree with the sequential one in float64 within {_PARITY:.0e}, got "
                f"{error:.1e}; nothing was timed"
            )


def compare(methods: Sequence[str], T: int, S: int, varying: bool, options: Options) -> Iterator[dict[str, Any]]:
    """Time the methods alternately on float32 inputs (T, S), in reverse as in a backward pass."""
    free = free_bytes(options.device)
    fitting = [method for method in methods if _BYTES[method] * T * S <= free]
    seconds: dict[str, list[Seconds]] = {}
    errors: dict[str, float] = {}
    if fitting:
        x, a = problem(T, S, varying, options.device)
        exact = sf.diagonal_scan(x.double(), a.double(), reverse=True, method="sequential")

        def once(method: str) -> Seconds:
            start = clock(options.device)
            y = sf.diagonal_scan(x, a, reverse=True, method=method)
            stop = clock(options.device)
            if method not in errors:
                errors[method] = largest_error(y, exact)
            return (stop - start,)

        seconds = interleaved({method: lambda method=method: once(method) for method in fitting}, options.rounds)  # type: ignore[misc]
    for method in methods:
        record = {
            "bench": "scan",
            "method": method,
            "diagonal": "varying" if varying else "stationary",
            "T": T,
            "S": S,
            "dtype": "float32",
            "device": options.device,
            "repeats": options.rounds,
        }
        if method not in fitting:
            needed = _BYTES[method] * T * S
            yield {**record, "not_run": f"needs up to {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are allowed"}
            continue
        ms = spread([1e3 * s for (s,) in seconds[method]])
        yield {**record, "ms": ms, "ns_per_element": 1e6 * ms["median"] / (T * S), "error": errors[method]}


def free_bytes(device: str) -> float:
    """Three quarters of the free memory, or of all memory if the system does not report free memory."""
    if device == "cuda":
        return 0.75 * torch.cuda.mem_get_info()[0]
    linux = Path("/proc/meminfo")
    if linux.exists() and (available := re.search(r"MemAvailable:\s+(\d+) kB", linux.read_text())):
        return 0.75 * 1024 * int(available[1])
    return 0.75 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per record."""
    from rich.table import Table

    result = Table(
        title="diagonal_scan in float32, in reverse: median of the repetitions (min-max)",
        caption="growth: exponent of T in the time, from the previous T; error: against float64, relative to the "
        "largest value of the unit, worst unit",
    )
    for heading in ("S", "diagonal", "T", "method"):
        result.add_column(heading, no_wrap=True)
    for heading in ("ms", "ns per element", "growth", "error"):
        result.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        place = (str(r["S"]), r["diagonal"], str(r["T"]), r["method"])
        if "ms" not in r:
            result.add_row(*place, f"not run: {r['not_run']}")
            continue
        ms = r["ms"]
        result.add_row(
            *place,
            f"{ms['median']:.3f} ({ms['min']:.3f} to {ms['max']:.3f})",
            f"{r['ns_per_element']:.2f}",
            f"{r['growth']:.2f}" if "growth" in r else "",
            f"{r['error']:.1e}",
        )
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Time and error over T for every width, one line per method."""
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(r["S"] for r in records))
    result = Figure(figsize=(4 * len(widths), 7), layout="constrained")
    axes = result.subplots(2, len(widths), squeeze=False)
    for k, S in enumerate(widths):
        lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for r in records:
            if r["S"] == S and "ms" in r:
                lines.setdefault((r["method"], r["diagonal"]), []).append(r)
        for (method, diagonal), rows in lines.items():
            T = [r["T"] for r in rows]
            style = "-" if diagonal == "stationary" else "--"
            color = f"C{METHODS.index(method)}"
            label = f"{method}, {diagonal}"
            marker = _MARKERS[METHODS.index(method)]
            axes[0, k].plot(T, [r["ms"]["median"] for r in rows], style, color=color, marker=marker, label=label)
            axes[1, k].plot(T, [r["error"] for r in rows], style, color=color, marker=marker, label=label)
        axes[0, k].set(title=f"S = {S}", ylabel="milliseconds", xscale="log", yscale="log")
        axes[1, k].set(xlabel="T, steps", ylabel="largest error against float64", xscale="log", yscale="log")
    for panel in axes.flat:
        panel.legend(fontsize=6)
    result.suptitle(f"{machine_line(records)}; medians of the repetitions", fontsize=9)
    return result
