"""Measurement: interleaved timing, torch settings, product rates of the machine, and the environment of a record."""

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
# Another order of summation may double the error; computing in bfloat16 multiplies it by about a thousand.
_STILL_FLOAT32 = 8.0
_DTYPES = {"bfloat16": torch.bfloat16, "float64": torch.float64}
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve")


class ParityError(RuntimeError):
    """A contender computes a wrong result; ``statefeed bench`` exits with code 1."""


class Setting(NamedTuple):
    """One configuration of torch for float32 products.

    Attributes:
        name: name in the records.
        onednn_matmul: float32 products use oneDNN instead of the BLAS library. torch does so only if bfloat16 is also
            permitted, which oneDNN uses on some machines: see ``product_error``.
        onednn: whether oneDNN is used at all.
        tf32: on a GPU, whether cuBLAS and cuDNN compute float32 products in TF32; None for the current setting.
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
    """Apply a setting inside the context and restore the previous one afterwards; ``SHIPPED`` changes nothing."""
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
    a, b = (torch.randn(shape, generator=generator, device="cpu") for shape in ((512, 256), (256, 768)))
    with applied(setting):
        product = a @ b
    return float((product.double() - a.double() @ b.double()).abs().max())


def usual(device: str, dtype: str) -> Setting:
    """The setting of all contenders: torch as shipped on a CPU.

    On a GPU float32 products are computed in float32 unless the dtype is "tf32". As shipped, torch lets cuDNN's layers
    use TF32 and computes other products in float32.

    Args:
        device: cpu or cuda.
        dtype: float32, tf32 or bfloat16.
    """
    return Setting("cuDNN", tf32=dtype == "tf32") if device == "cuda" else SHIPPED


def float32_settings(device: str) -> list[Setting]:
    """The settings that compute in float32: the usual one, then a CPU's others whose error is small enough."""
    if device != "cpu" or not torch._C._has_mkldnn:
        return [usual(device, "float32")]
    allowed = _STILL_FLOAT32 * product_error(SHIPPED)
    return [SHIPPED, *(s for s in (ONEDNN_MATMUL, NO_ONEDNN) if product_error(s) <= allowed)]


def clock(device: str) -> float:
    """Time in seconds, after all queued work of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(contenders: Mapping[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """Time all contenders alternately, so that slow periods of the machine affect all of them.

    Args:
        contenders: name -> a call that does the work once and returns the seconds of its phases.
        rounds: number of measurements of every contender; the order alternates. A warm-up round comes first.

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
    """Median, minimum and maximum.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def matmul_rates(device: str, smoke: bool) -> dict[str, dict[str, Any]]:
    """The best measured rate of a matrix product on this machine, in every precision.

    Args:
        device: cpu or cuda.
        smoke: one tiny product.

    Returns:
        dtype -> ``gflops``, and the ``product`` (MxKxN) and ``setting`` with that rate.
    """
    tried = [("float32", setting) for setting in float32_settings(device)]
    others = ("float64", "bfloat16") if device == "cpu" else ("float64", "tf32", "bfloat16")
    tried += [(dtype, usual(device, dtype)) for dtype in others]
    rates: dict[str, dict[str, Any]] = {}
    for dtype, setting in tried:
        dtype_of = _DTYPES.get(dtype, torch.float32)
        for M, K, N in _SMOKE_PRODUCTS if smoke else _GPU_PRODUCTS if device == "cuda" else _PRODUCTS:
            a, w = (torch.randn(shape, device=device).to(dtype_of) for shape in ((M, K), (N, K)))
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


def environment(arguments: Sequence[str], device: str) -> dict[str, Any]:
    """Metadata of every record: command, commit, machine, threads, versions and date.

    Args:
        arguments: arguments after ``statefeed bench``.
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


def machine_line(records: Sequence[Mapping[str, Any]]) -> str:
    """Processor or GPU, threads and version of torch of some records, for a title."""
    found = next((record for record in records if "machine" in record), None)
    if found is None:
        return "machine not recorded"
    machine = found["machine"]
    threads = f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}"
    return f"{machine['gpu'] or machine['cpu']}, {threads}, torch {found['versions']['torch']}"


def _flushes_denormals() -> bool:
    """Whether this thread flushes denormals to zero."""
    return not bool(torch.tensor([1e-30], device="cpu") * torch.tensor([1e-10], device="cpu"))
