"""Records of a stage: JSON lines, appended, each with the environment of the measurement."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from statefeed.bench import measure, precision

# Fields of the nvidia-smi query.
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"
_CLOCKS_EVERY = 1.0


class Records:
    """The file of a stage's records.

    Args:
        stage: name of the stage.
        device: cpu or cuda.
        folder: folder of the file, ``gpu-<stage>.jsonl``.
    """

    def __init__(self, stage: str, device: str, folder: Path) -> None:
        self.stage, self.device, self.path = stage, device, folder / f"gpu-{stage}.jsonl"
        self._environment = {"command": f"statefeed/bench/gpu.sh {stage}", **environment(device)}
        self._clocks: tuple[float, dict[str, str] | None] = (-_CLOCKS_EVERY, None)

    def append(self, record: dict[str, Any]) -> None:
        """Append one record to the file, and print a short form of it."""
        gpu = None
        if self.device == "cuda":
            if time.monotonic() - self._clocks[0] >= _CLOCKS_EVERY:  # a query takes 0.1 s
                self._clocks = time.monotonic(), clocks()
            gpu = {**self._environment["gpu"], "clocks": self._clocks[1]}
        line = {"stage": self.stage, **self._environment, "gpu": gpu, **record}
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        shown = {
            key: f"{value['median']:.3g}" if isinstance(value, dict) and "median" in value else value
            for key, value in record.items()
            if not isinstance(value, dict) or "median" in value
        }
        print(f"{self.stage}: {' '.join(f'{key}={value}' for key, value in shown.items())}", flush=True)


def environment(device: str) -> dict[str, Any]:
    """Commit, machine, versions (including driver, CUDA, cuDNN and Triton), and the TF32 settings."""
    found = measure.environment([], device)
    del found["command"]
    found["versions"] |= {name: _version(name) for name in ("triton", "numpy", "flashrnn", "accelerated-scan")}
    found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    found["tf32"] = precision.flags()
    found["gpu"] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": nvidia_smi("driver_version"),
        }
    return found


def clocks() -> dict[str, str] | None:
    """Current clocks, temperature and power of the GPU from nvidia-smi; None without it."""
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    answer = nvidia_smi(_CLOCKS, "0" if uuid is None else f"GPU-{uuid}")
    return None if answer is None else dict(zip(_CLOCKS.split(","), answer.split(", "), strict=True))


def nvidia_smi(query: str, gpu: str = "0") -> str | None:
    """The output of nvidia-smi for one GPU; None if it cannot be queried."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
