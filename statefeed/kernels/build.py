"""Compile, cache and load the C++ of ``cpu/``: one shared library against torch's stable ABI.

The cache knows the sources, torch, the compiler and the CPU, so that a home shared by unlike machines serves each of
them; a lock makes processes that start together build once, and a rename makes the result appear whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpu"
PREBUILT = Path(__file__).parent / "prebuilt"
# Torch 2.10, the first stable ABI that carries what is used here.
_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# What every level of the x86-64 ladder needs of /proc/cpuinfo.
_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}


def load() -> str | None:
    """Make ``torch.ops.statefeed`` usable; the reason if that cannot be."""
    try:
        torch.ops.load_library(str(_prebuilt() or _built()))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        return str(error)
    from statefeed.kernels import fakes  # noqa: F401

    return None


def compile_library(target: Path, machine_flags: list[str]) -> None:
    """Compile every source file at once and link them to ``target``; RuntimeError with the compiler's words."""
    compiler = _compiler()
    include = ["-I", str(Path(torch.__file__).parent / "include")]
    with tempfile.TemporaryDirectory() as directory:
        jobs = []
        for source in sorted(SOURCES.glob("*.cc")):
            object_file = str(Path(directory) / f"{source.stem}.o")
            command = [compiler, *_FLAGS, *machine_flags, *include, "-c", str(source), "-o", object_file]
            jobs.append((object_file, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        errors = [job.communicate()[1] for _, job in jobs]
        for (_, job), error in zip(jobs, errors, strict=True):
            if job.returncode:
                raise RuntimeError(f"{compiler} failed: {_first_error(error)}")
        library = str(Path(directory) / "library.so")
        link = ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu"]
        command = [compiler, "-shared", *(name for name, _ in jobs), *link, "-o", library]
        linked = subprocess.run(command, capture_output=True, text=True, check=False)
        if linked.returncode:
            raise RuntimeError(f"{compiler} failed: {_first_error(linked.stderr)}")
        # Another file system may lie between: copy beside the target, then rename.
        beside = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(library, beside)
        os.replace(beside, target)


def _prebuilt() -> Path | None:
    """The best library of a wheel that this CPU can run."""
    flags = set(_cpu().split())
    for level, needed in _LEVELS.items():
        library = PREBUILT / f"{level}.so"
        if needed <= flags and library.exists():
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
                native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
                compile_library(target, [native])
    return target


def _key() -> str:
    version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    parts = [torch.__version__, sys.platform, platform.machine(), _cpu(), _compiler(), version, *_FLAGS]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise OSError("there is no C++ compiler")


def _cpu() -> str:
    """The instruction sets of this CPU, as one line."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])
