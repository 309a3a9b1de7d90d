"""Provenance of a record: commit of the package and processor."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import statefeed as sf


def commit() -> dict[str, Any]:
    """Commit of the git checkout of the package, and whether it has uncommitted changes; None outside a checkout."""
    package = Path(sf.__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return {"commit": None, "dirty": None}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def processor() -> str:
    """Name of the processor and, on x86, its family: on cloud machines the name does not identify the generation."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    family = cpuinfo("cpu family")
    return f"{name}, family {family}" if family else name


def cpuinfo(key: str) -> str | None:
    """Value of a key in /proc/cpuinfo; None on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), None)
