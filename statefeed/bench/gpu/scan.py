"""Stage "scan": the methods of diagonal_scan, "auto" (Triton on a GPU) first, and accelerated-scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import statefeed as sf
from statefeed.bench.gpu import rivals
from statefeed.bench.gpu.stage import Options
from statefeed.bench.gpu.timing import Work, measure
from statefeed.bench.scan import METHODS, check_parity, largest_error, problem

# T and S: S counts the units of all sequences of a layer, such as 128 x 512.
SHAPES = ((256, 65_536), (1024, 2048), (1024, 128), (4096, 4096), (64, 131_072), (16_384, 2048), (65_536, 128))
SMOKE = ((5, 3), (8, 4))
# Longest T of the sequential method, which launches one kernel per step.
_LONGEST_SEQUENTIAL = 4096
# Allowed error against float64, relative to the largest value of the unit.
_ALLOWED = 1e-4


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Check every method in float64, then time it in float32, in reverse as in a backward pass.

    Yields:
        One record per method, shape and kind of diagonal, with the times, or ``failed`` or ``not_run``.
    """
    for varying in (False, True):
        for method in METHODS:
            if varying and method == "fft":
                continue
            record = {"method": method, "diagonal": "varying" if varying else "stationary", "dtype": "float64"}
            try:
                check_parity([method], varying, options.device)
            except Exception as error:
                yield {**record, "failed": f"{type(error).__name__}: {error}"}
    for T, S in SMOKE if options.smoke else SHAPES:
        for varying in (False, True):
            yield from compare(T, S, varying, options)


def compare(T: int, S: int, varying: bool, options: Options) -> Iterator[dict[str, Any]]:
    """Time the methods alternately on one problem."""
    shape = {"T": T, "S": S, "diagonal": "varying" if varying else "stationary", "dtype": "float32"}
    record = {**shape, "device": options.device, "repeats": options.rounds}
    if options.time_left() <= 0:
        yield {**record, "not_run": "no time left"}
        return
    x, a = problem(T, S, varying, options.device)
    exact = _exact(x, a)
    scans: dict[str, Callable[[], Tensor]] = {}
    for method in METHODS:
        if not (varying and method == "fft") and not (method == "sequential" and T > _LONGEST_SEQUENTIAL):
            scans[method] = lambda method=method: sf.diagonal_scan(x, a, reverse=True, method=method)  # type: ignore[misc]
    results = scans.copy()
    if options.device == "cuda":
        try:
            raw = rivals.accelerated_scan(x, a, options.time_left())
            scans["accelerated-scan"], results["accelerated-scan"] = raw, lambda: raw()[0].T.flip(0)
        except Exception as error:  # errors of another package are recorded, not raised
            yield {**record, "method": "accelerated-scan", "not_run": f"{type(error).__name__}: {error}"}
    timed = {name: Work(scan, lambda y: None) for name, scan in scans.items()}
    for name, found in measure(timed, options.rounds, options.device).items():
        if "failed" not in found:
            found["error"] = largest_error(results[name](), exact)
            if not found["error"] <= _ALLOWED:
                found["failed"] = f"error {found['error']:.1e} where {_ALLOWED:.0e} is allowed"
            bytes_moved = 4 * (2 + varying) * x.numel()
            found["gigabytes_per_s"] = 1e-6 * bytes_moved / found["ms"]["median"]
        yield {**record, "method": name, **found}


def _exact(x: Tensor, a: Tensor) -> Tensor:
    """The scan in float64, step by step."""
    x, a = x.double(), a.double().expand_as(x)
    y = torch.empty_like(x)
    y[-1] = x[-1]
    for t in reversed(range(len(x) - 1)):
        torch.addcmul(x[t], a[t], y[t + 1], out=y[t])
    return y
