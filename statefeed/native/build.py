"""Loading of the C++ kernels: a wheel's library, or one compiled for this machine and cached.

The cache key covers the sources, torch, the compiler, its flags and the CPU, so that different machines can share one
home folder. A lock makes concurrent processes build once; an atomic rename publishes the library. The cache
folder is private, and a library that others may have written is not loaded but replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from statefeed.native.cache_folder import cache_folder, distrust, make_private
from statefeed.native.compile import FLAGS, VARIANTS, compile_library, compiler, sources
from statefeed.user_warning import warn

PREBUILT = Path(__file__).parent / "prebuilt"
NOTICE_DELAY = 2.0  # seconds
NOTICE = "statefeed: compiling the CPU kernels, once per machine, about 20 seconds of one core"


def load() -> str:
    """Load the operators of ``torch.ops.statefeed``; compile them if neither wheel nor cache contains them.

    Returns:
        A description of the library, for ``sf.explain``.

    Raises:
        OSError, RuntimeError: the library cannot be compiled, cached or loaded.
    """
    prebuilt = prebuilt_library()
    torch.ops.load_library(str(prebuilt or compiled_library()))  # type: ignore[no-untyped-call]
    from statefeed.native import fakes, flops  # noqa: F401

    return f"the wheel's {prebuilt.stem}" if prebuilt else f"compiled here for {instruction_set()}"


def instruction_set() -> str:
    """The name of the best variant that this CPU can run."""
    flags = set(cpu_flags().split())
    for variant in VARIANTS:
        if variant.machine == platform.machine() and variant.required <= flags:
            return variant.name
    return platform.machine()


def prebuilt_library() -> Path | None:
    """The best library of the wheel that this CPU can run."""
    flags = set(cpu_flags().split())
    for variant in VARIANTS:
        library = PREBUILT / f"{variant.name}.so"
        if variant.machine == platform.machine() and variant.required <= flags and library.exists():
            return library
    return None


def compiled_library() -> Path:
    """The library for this machine, from the cache or compiled into it."""
    cache = cache_folder()
    target = cache / f"kernels-{cache_key()}.so"
    make_private(cache)
    if not _usable(target):
        with _locked(cache / "lock"):
            if not _usable(target, warns=True):
                with _notice():
                    compile_library(target, Path(torch.__file__).parent, machine_flags())
    return target


@contextlib.contextmanager
def _notice() -> Iterator[None]:
    """Say on stderr what takes so long, once the block has run for ``NOTICE_DELAY`` seconds."""
    timer = threading.Timer(NOTICE_DELAY, _print_notice)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print_notice() -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed stderr
        print(NOTICE, file=sys.stderr, flush=True)


def _usable(library: Path, warns: bool = False) -> bool:
    """Whether a compiled library exists and nobody else can have written it: loading it runs its code."""
    try:
        reason = distrust(library)
    except FileNotFoundError:
        return False
    if reason is not None and warns:
        warn(f"{reason}: the kernels are compiled again", RuntimeWarning)
    return reason is None


def machine_flags() -> list[str]:
    """The compiler flags for this CPU."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["-mcpu=native"]
    # With the tuning for some CPUs, GCC loads the weights of a product once per row instead of once in total. The
    # compiler only checks the CPU, but Linux may not permit its tile registers.
    tiles = "amx_bf16" in cpu_flags().split()
    return ["-march=native", "-mtune=generic", *([] if tiles else ["-U__AMX_BF16__"])]


def cache_key() -> str:
    """The part of the name of a compiled library that identifies sources, torch, compiler, flags and CPU."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False)
    if version.returncode:
        raise RuntimeError(
            f"{shlex.join(compiler())} --version failed with exit code {version.returncode}: is CXX a compiler?"
        )
    parts = [torch.__version__, sys.platform, platform.machine(), cpu_flags(), *compiler(), version.stdout]
    digest = hashlib.sha256("\n".join([*parts, *FLAGS, *machine_flags()]).encode())
    for source in sources(".cc", ".h"):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def cpu_flags() -> str:
    """The CPU flags that this process may use, separated by spaces."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = line.partition(":")[2].split()
                tiles = "amx_tile" in flags and tiles_permitted()
                return " ".join(flag for flag in flags if tiles or not flag.startswith("amx"))
    return platform.processor()


@functools.cache
def tiles_permitted() -> bool:
    """Request permission for the AMX registers from Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, 18)."""
    return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, (158, 0x1023, 18))) == 0)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        with contextlib.suppress(OSError):  # without locks in the file system, several processes may compile
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
