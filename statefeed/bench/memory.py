"""``statefeed bench memory``: peak memory of one layer's forward and backward pass.

The operating system's count is used, so that memory of kernels, libraries and allocators is included. Every number
comes from a new process. It runs a small layer, which loads all libraries, releases free memory, resets its
high-water mark (VmHWM, Linux), runs forward and backward once, and reads how far the mark has grown. On a GPU the
number is the growth of torch's own high-water mark. Input and output gradient are allocated before; outputs, values
saved for the backward pass, all gradients, and memory that kernels keep for the next call count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from statefeed.bench.case import Case, contenders
from statefeed.bench.measure import machine_line, spread, usual
from statefeed.bench.options import GATES, MEMORY_MARK, Shape, names, rules_of, shapes
from statefeed.bench.options import MemoryOptions as Options
from statefeed.bench.parity import check_parity

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_WARM_UP = Shape(64, 8, 8)  # of a few steps, torch's own layer would run instead of the kernels


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure all contenders of all cases.

    Args:
        options: checked options.

    Yields:
        One record per contender and case, after the parity check of all of them.

    Raises:
        ParityError: a contender is wrong; nothing was measured.
    """
    sizes = [Shape(32, 8, 64)] if options.smoke else shapes(options.shapes)
    plans = []
    for cell in names("cells", options.cells, tuple(GATES)):
        for shape in sizes:
            case = Case(cell, shape, "float32", options.device)
            entries = contenders(case, rules_of(cell, options.rules), [usual(case.device, case.dtype)])
            check_parity(case, entries)
            plans.append((case, entries))
    for case, entries in plans:
        T, B, H = case.shape
        peaks = [
            spread([in_new_process(case, options.rules, k) for _ in range(options.rounds)]) for k in range(len(entries))
        ]
        peak_of = {entry.implementation: peak["median"] for entry, peak in zip(entries, peaks, strict=True)}
        for entry, peak in zip(entries, peaks, strict=True):
            yield {
                "bench": "memory",
                "implementation": entry.implementation,
                "variant": entry.variant,
                "cell": case.cell,
                "T": T,
                "B": B,
                "I": H,
                "H": H,
                "dtype": case.dtype,
                "device": case.device,
                "repeats": options.rounds,
                "counted": "VmHWM of a fresh process" if case.device == "cpu" else "torch.cuda.max_memory_allocated",
                "peak_bytes": peak,
                "outputs_bytes": 4 * T * B * H,
                "times_less_than": {
                    baseline: peak_of[baseline] / peak["median"] for baseline in ("torch.nn", "published")
                },
            }


def in_new_process(case: Case, rules: str, contender: int) -> int:
    """The peak of one contender in bytes, measured by ``measure`` in a new Python process."""
    task = json.dumps([case.cell, case.shape, case.dtype, case.device, rules, contender, torch.get_num_threads()])
    code = "import sys; from statefeed.bench.memory import measure; measure(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, task], stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout)


def measure(task: str) -> None:
    """Run one contender once and print its peak in bytes; called in a separate process.

    Args:
        task: JSON list of cell, shape, dtype, device, rules, index of the contender, and threads.
    """
    cell, shape, dtype, device, rules, contender, threads = json.loads(task)
    torch.set_num_threads(threads)
    small, case = Case(cell, _WARM_UP, dtype, device), Case(cell, Shape(*shape), dtype, device)
    warm_up, entry = (contenders(c, rules_of(cell, rules), [usual(device, dtype)])[contender] for c in (small, case))
    warm_up.once(small.data())
    data = case.data()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        entry.once(data)
        print(torch.cuda.max_memory_allocated() - before)
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    MEMORY_MARK.write_text("5")  # resets VmHWM to the current memory
    before = _high_water_mark()
    entry.once(data)
    print(max(_high_water_mark() - before, mmap.PAGESIZE))  # the resolution is one page


def _high_water_mark() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per record."""
    from rich.table import Table

    result = Table(
        title="peak memory of forward + backward of one layer: median of the repetitions (min-max)",
        caption="outputs: in units of the layer's outputs, T*B*H values; x: times less than (below 1: more)",
    )
    for heading in ("cell", "T x B x H", "what"):
        result.add_column(heading, no_wrap=True)
    for heading in ("MiB", "outputs", "x torch.nn", "x published"):
        result.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        peak = {k: v / 2**20 for k, v in r["peak_bytes"].items()}
        result.add_row(
            r["cell"],
            f"{r['T']}x{r['B']}x{r['H']}",
            f"{r['implementation']} {r['variant']}",
            f"{peak['median']:.1f} ({peak['min']:.1f} to {peak['max']:.1f})",
            f"{r['peak_bytes']['median'] / r['outputs_bytes']:.1f}",
            *(f"{ratio:.2f}" for ratio in r["times_less_than"].values()),
        )
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """One panel per cell and shape, one bar per contender."""
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((r["cell"], r["T"], r["B"], r["H"]) for r in records))
    result = Figure(figsize=(8, 2.2 * len(places)), layout="constrained")
    for axes, place in zip(result.subplots(len(places), squeeze=False)[:, 0], places, strict=True):
        cell, T, B, H = place
        rows = [r for r in records if (r["cell"], r["T"], r["B"], r["H"]) == place]
        bars = [f"{r['implementation']} {r['variant']}" for r in rows]
        axes.barh(bars, [r["peak_bytes"]["median"] / 2**20 for r in rows])
        axes.invert_yaxis()
        axes.set(title=f"{cell} {T}x{B}x{H}: peak of forward + backward", xlabel="MiB")
    result.suptitle(machine_line(records), fontsize=9)
    return result
