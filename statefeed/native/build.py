"""Compile, cache and load the C++ of ``cpu/``: one shared library against torch's stable ABI.

The cache knows the sources, torch, the compiler and the CPU, so that a home shared by unlike machines serves each of
them; a lock makes processes that start together build once, and a rename makes the result appear whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from statefeed.native.compile import FLAGS, VARIANTS, compile_library, compiler, sources

PREBUILT = Path(__file__).parent / "prebuilt"


def load() -> str:
    """Make ``torch.ops.statefeed`` usable; returns what was loaded, OSError or RuntimeError if that cannot be."""
    prebuilt = _prebuilt()
    torch.ops.load_library(str(prebuilt or _built()))  # type: ignore[no-untyped-call]
    from statefeed.native import fakes  # noqa: F401

    return f"the wheel's {prebuilt.stem}" if prebuilt else f"compiled here for {_instruction_set()}"


def _instruction_set() -> str:
    """The best of the variants that this CPU has all of, by name."""
    flags = set(_cpu().split())
    for variant in VARIANTS:
        if variant.machine == platform.machine() and variant.needs <= flags:
            return variant.name
    return platform.machine()


def _prebuilt() -> Path | None:
    """The best library of a wheel that this CPU can run."""
    flags = set(_cpu().split())
    for variant in VARIANTS:
        library = PREBUILT / f"{variant.name}.so"
        if variant.machine == platform.machine() and variant.needs <= flags and library.exists():
            return library
    return None


def _built() -> Path:
    """The library for this very machine, compiled unless the cache has it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statefeed"
    target = cache / f"kernels-{_key()}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            if not target.exists():
                compile_library(target, Path(torch.__file__).parent, _native())
    return target


def _native() -> list[str]:
    """The flags for this very machine; a compiler asks the CPU alone, and Linux may refuse what the CPU has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["-mcpu=native"]
    # Tuned for some CPUs, GCC reads a product's weights from memory once for every row instead of once for all.
    return ["-march=native", "-mtune=generic", *([] if "amx_bf16" in _cpu().split() else ["-U__AMX_BF16__"])]


def _key() -> str:
    asked = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise RuntimeError(f"{compiler()} --version failed with exit code {asked.returncode}: is CXX a compiler?")
    version = asked.stdout
    parts = [torch.__version__, sys.platform, platform.machine(), _cpu(), compiler(), version, *FLAGS, *_native()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sources(".cc", ".h"):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """The instruction sets of this CPU that this process may use, as one line."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = line.partition(":")[2].split()
                tiles = "amx_tile" in flags and _may_use_tiles()
                return " ".join(flag for flag in flags if tiles or not flag.startswith("amx"))
    return platform.processor()


@functools.cache
def _may_use_tiles() -> bool:
    """Ask Linux for the registers of AMX, which a process has only on request: arch_prctl(ARCH_REQ_XCOMP_PERM, 18)."""
    return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, (158, 0x1023, 18))) == 0)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
