"""Call the C++ compiler on ``cpu/``; of torch it knows the folder only, so that any Python can build a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

NATIVE = Path(__file__).parent
SOURCES = (NATIVE, NATIVE.parent / "backends" / "cpu")
# Torch 2.10, the first stable ABI that carries what is used here.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


class Variant(NamedTuple):
    """One library of a wheel: the machine it is for, what it needs of the CPU, and what the compiler is told."""

    name: str
    machine: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_V3 = frozenset(["avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"])
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# The best first.
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


def compiler() -> str:
    """The path of the C++ compiler: ``CXX``, else the first of the usual names."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise OSError("there is no C++ compiler")


def sources(*endings: str) -> list[Path]:
    """The C++ files of the library with one of these endings."""
    return sorted(file for folder in SOURCES for file in folder.rglob("*") if file.suffix in endings)


def compile_library(target: Path, torch: Path, machine_flags: list[str]) -> None:
    """Compile every source file at once and link them to ``target``; RuntimeError with the compiler's words."""
    program = compiler()
    include = [f"-I{torch / 'include'}", *(f"-I{folder}" for folder in SOURCES)]
    with tempfile.TemporaryDirectory() as directory:
        jobs = []
        for source in sources(".cc"):
            made = str(Path(directory) / f"{source.stem}.o")
            command = [program, *FLAGS, *machine_flags, *include, "-c", str(source), "-o", made]
            jobs.append((made, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        # Every job is waited for before any is judged.
        for (_, job), error in [(job, job[1].communicate()[1]) for job in jobs]:
            _judge(program, job.returncode, error)
        library = Path(directory) / "library.so"
        command = [
            program,
            "-shared",
            *(made for made, _ in jobs),
            f"-L{torch / 'lib'}",
            "-ltorch_cpu",
            "-o",
            str(library),
        ]
        linked = subprocess.run(command, capture_output=True, text=True, check=False)
        _judge(program, linked.returncode, linked.stderr)
        # Another file system may lie between: copy beside the target, then rename.
        beside = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(library, beside)
        os.replace(beside, target)


def _judge(program: str, status: int, words: str) -> None:
    if status:
        lines = words.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{program} failed: {next((line for line in lines if 'error' in line), lines[0])}")
