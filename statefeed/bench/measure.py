"""Owns how a number is taken: turns and medians, torch's settings, the rate of this machine's products, its record."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

import statefeed as sf
from statefeed.bench.precision import onednn_bfloat16, tf32
from statefeed.lm.run import provenance

Seconds = tuple[float, ...]

_PRODUCTS = ((1024, 1024, 1024), (2048, 256, 768), (4096, 512, 2048))
_GPU_PRODUCTS = (*_PRODUCTS, (8192, 4096, 4096))
_SMOKE_PRODUCTS = ((64, 64, 64),)
_RATE_REPEATS = 10
# Another order of summation may double an error; a product computed in bfloat16 multiplies it by a thousand.
_STILL_FLOAT32 = 8.0
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve")


class ParityError(RuntimeError):
    """What was to be timed computes something else; ``statefeed bench`` turns it into exit code 1."""


class Setting(NamedTuple):
    """One way for a user to set torch up for float32 work.

    Attributes:
        name: as it stands in the records.
        onednn_matmul: float32 products go to oneDNN instead of the BLAS library. torch sends them there only with leave
            to compute in bfloat16, of which oneDNN makes use on some machines: see ``product_error``.
        onednn: oneDNN is used at all.
        tf32: on a GPU, whether cuBLAS and cuDNN compute float32 products in TF32; None leaves both as they are.
    """

    name: str
    onednn_matmul: bool = False
    onednn: bool = True
    tf32: bool | None = None


SHIPPED = Setting("as shipped")
ONEDNN_MATMUL = Setting("oneDNN matmul", onednn_matmul=True)
NO_ONEDNN = Setting("no oneDNN", onednn=False)


@contextlib.contextmanager
def applied(setting: Setting) -> Iterator[None]:
    """torch as the setting says; what it was is restored. ``SHIPPED`` touches nothing."""
    onednn: Any = torch.backends.mkldnn
    enabled = onednn.enabled
    with contextlib.ExitStack() as settings:
        if setting.onednn_matmul:
            settings.enter_context(onednn_bfloat16())
        if setting.tf32 is not None:
            settings.enter_context(tf32(setting.tf32))
        try:
            if not setting.onednn:
                onednn.enabled = False
            yield
        finally:
            if not setting.onednn:
                onednn.enabled = enabled


def product_error(setting: Setting) -> float:
    """The largest error of a float32 product (512x256x768, unit normal) under a setting, against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((512, 256), (256, 768)))
    with applied(setting):
        product = a @ b
    return float((product.double() - a.double() @ b.double()).abs().max())


def usual(device: str, dtype: str) -> Setting:
    """What everyone runs under: torch as shipped on a CPU.

    On a GPU the dtype says how float32 products are computed: exactly, but for "tf32". As shipped, torch lets cuDNN's
    layers use TF32 and keeps other products exact.

    Args:
        device: cpu or cuda.
        dtype: float32, tf32 or bfloat16.
    """
    return Setting("cuDNN", tf32=dtype == "tf32") if device == "cuda" else SHIPPED


def float32_settings(device: str) -> list[Setting]:
    """The settings under which a float32 product is one: the usual first, a CPU's others by their error in float64."""
    if device != "cpu" or not torch._C._has_mkldnn:
        return [usual(device, "float32")]
    allowed = _STILL_FLOAT32 * product_error(SHIPPED)
    return [SHIPPED, *(s for s in (ONEDNN_MATMUL, NO_ONEDNN) if product_error(s) <= allowed)]


def clock(device: str) -> float:
    """Seconds, after everything queued on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(contenders: Mapping[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """Every contender's seconds, taken in turns so that a slow moment of the machine meets all alike.

    Args:
        contenders: name -> a call that does the work once and returns the seconds of its phases.
        rounds: how often everyone has a turn; the order is turned round every time. One more comes first, unmeasured.

    Returns:
        name -> one tuple of seconds per round.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for work in contenders.values():
        work()
    gc.collect()
    gc.disable()
    try:
        for k in range(rounds):
            for name in list(contenders)[:: -1 if k % 2 else 1]:
                seconds[name].append(contenders[name]())
    finally:
        gc.enable()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def matmul_rates(device: str, smoke: bool) -> dict[str, dict[str, Any]]:
    """The best rate of a matrix product that this process finds on this machine, in exact float32 and in narrower.

    Args:
        device: cpu or cuda.
        smoke: one tiny product.

    Returns:
        dtype -> ``gflops``, and the ``product`` (MxKxN) and ``setting`` that reached it.
    """
    tried = [("float32", setting) for setting in float32_settings(device)]
    tried += [(dtype, usual(device, dtype)) for dtype in ("tf32", "bfloat16") if device == "cuda" or dtype != "tf32"]
    rates: dict[str, dict[str, Any]] = {}
    for dtype, setting in tried:
        held = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        for M, K, N in _SMOKE_PRODUCTS if smoke else _GPU_PRODUCTS if device == "cuda" else _PRODUCTS:
            a, w = (torch.randn(shape, device=device).to(held) for shape in ((M, K), (N, K)))
            seconds = []
            with applied(setting):
                for _ in range(1 + _RATE_REPEATS):
                    start = clock(device)
                    F.linear(a, w)
                    seconds.append(clock(device) - start)
            gflops = 2e-9 * M * K * N / min(seconds)
            if gflops > rates.get(dtype, {"gflops": 0.0})["gflops"]:
                rates[dtype] = {"gflops": gflops, "product": f"{M}x{K}x{N}", "setting": setting.name}
    return rates


def circumstances(arguments: Sequence[str], device: str) -> dict[str, Any]:
    """What stands in every record besides the numbers: command, commit, machine, threads, versions and date.

    Args:
        arguments: of the command, after ``statefeed bench``.
        device: cpu or cuda.
    """
    return {
        "command": f"statefeed bench {shlex.join(arguments)}",
        **provenance.commit(),
        "machine": {
            "cpu": provenance.processor(),
            "flags": [
                flag
                for flag in _FLAGS
                if flag in (provenance.cpuinfo("flags") or provenance.cpuinfo("Features") or "").split()
            ],
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "system": platform.system(),
        },
        "threads": torch.get_num_threads(),
        "denormals": "flushed" if _flushes_denormals() else "kept",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "statefeed": sf.__version__},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _flushes_denormals() -> bool:
    """Whether this thread flushes them, as the user has left it."""
    return not bool(torch.tensor([1e-30]) * torch.tensor([1e-10]))
