"""Compilation of the C++ kernels; needs only torch's folder, not torch, so that any Python can build a wheel."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

NATIVE = Path(__file__).parent
PACKAGE = NATIVE.parent
SOURCE_FOLDERS = (NATIVE, PACKAGE / "backends" / "cpu")
# Torch 2.10 is the first version whose stable ABI has all functions that register.cc uses.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


class Variant(NamedTuple):
    """One library of a wheel.

    Attributes:
        name: file name without suffix.
        machine: value of ``platform.machine()``.
        required: required CPU flags.
        flags: compiler flags that select the instruction set.
    """

    name: str
    machine: str
    required: frozenset[str]
    flags: tuple[str, ...]


_V3 = frozenset(["avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"])
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Best first.
VARIANTS = [
    Variant(
        "x86-64-v4-amx",
        "x86_64",
        _V4 | {"avx512_bf16", "amx_tile", "amx_bf16"},
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    ),
    Variant("x86-64-v4-bf16", "x86_64", _V4 | {"avx512_bf16"}, ("-march=x86-64-v4", "-mavx512bf16")),
    Variant("x86-64-v4", "x86_64", _V4, ("-march=x86-64-v4",)),
    Variant("x86-64-v3", "x86_64", _V3, ("-march=x86-64-v3",)),
    Variant("aarch64", "aarch64", frozenset(), ()),
]


def compiler() -> list[str]:
    """The path of the C++ compiler, and its first arguments: ``CXX`` if it is set, else g++, clang++ or c++.

    Raises:
        OSError: no compiler is found.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))  # such as "ccache g++"
    for name, *arguments in [chosen] if chosen else [["g++"], ["clang++"], ["c++"]]:
        if path := shutil.which(name):
            return [path, *arguments]
    if chosen:
        raise OSError(f"no C++ compiler found: CXX must name a program, got {os.environ['CXX']!r}")
    raise OSError("no C++ compiler found: install g++ or clang++, or set CXX")


def sources(*suffixes: str) -> list[Path]:
    """The C++ files of the library with one of these suffixes."""
    return sorted(file for folder in SOURCE_FOLDERS for file in folder.rglob("*") if file.suffix in suffixes)


def compile_library(target: Path, torch: Path, machine_flags: list[str]) -> None:
    """Compile all source files in parallel and link them to ``target``.

    Args:
        target: path of the library, replaced atomically.
        torch: the folder of the torch package.
        machine_flags: further compiler flags, such as the instruction set.

    Raises:
        RuntimeError: the compiler fails; the message contains its first error.
    """
    command = [*compiler(), *FLAGS, *machine_flags]
    # -isystem instead of -I suppresses warnings in torch's headers. The prefix map shortens paths in error messages.
    include = [f"-isystem{torch / 'include'}", *(f"-I{folder}" for folder in SOURCE_FOLDERS)]
    include.append(f"-fmacro-prefix-map={PACKAGE.parent}/=")
    with tempfile.TemporaryDirectory() as directory:
        objects = {source: str(Path(directory) / f"{source.stem}.o") for source in sources(".cc")}
        jobs = [
            subprocess.Popen([*command, *include, "-c", str(source), "-o", output], stderr=subprocess.PIPE, text=True)
            for source, output in objects.items()
        ]
        errors = [job.communicate()[1] for job in jobs]  # wait for all jobs before checking any
        for job, error in zip(jobs, errors, strict=True):
            _check(command[0], job.returncode, error)
        library = Path(directory) / "library.so"
        link = [command[0], "-shared", *command[1:]]  # with the same flags, because sanitizers need them at link time
        link += [*objects.values(), f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(library)]
        linked = subprocess.run(link, capture_output=True, text=True, check=False)
        _check(command[0], linked.returncode, linked.stderr)
        # The temporary folder may be on another file system: copy next to the target, then rename.
        with tempfile.TemporaryDirectory(dir=target.parent) as beside:
            temporary = Path(beside) / target.name
            shutil.copyfile(library, temporary)
            with temporary.open("rb+") as file:  # else a power loss can leave an empty library
                os.fsync(file.fileno())
            temporary.chmod(0o700)  # independent of the umask: a library that others can write to is not loaded
            os.replace(temporary, target)


def _check(program: str, status: int, messages: str) -> None:
    if status:
        lines = messages.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{program} failed: {next((line for line in lines if 'error' in line), lines[0])}")
