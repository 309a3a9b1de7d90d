"""The record of a run: its metadata, written before the first step and updated when it is resumed or diverges."""

import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import statefeed as sf
from statefeed.lm.atomic_file import write_text
from statefeed.lm.errors import UsageError
from statefeed.lm.run import provenance
from statefeed.lm.run.device import device_metadata
from statefeed.lm.run.distributed import Group
from statefeed.lm.run.files import CHECKPOINTS, RECORD
from statefeed.lm.run.schema import validate

# Keys that every record must have; it may have others.
_SCHEMA = {
    "splits": {...: {"sha256": str}},
    "steps_per_epoch": int,
    "parameters": int,
    "continued": ([{}], None),
    "paths": ([{}], None),
}


def environment(group: Group) -> dict[str, Any]:
    """Versions, machine and processes of a run."""
    return {
        "statefeed": sf.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **provenance.commit(),
        "machine": f"{provenance.processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "processes": group.size,
        **device_metadata(group.device),
    }


def read(folder: Path) -> dict[str, Any]:
    """Read the record of a run.

    Raises:
        UsageError: the record cannot be read.
    """
    try:
        found: dict[str, Any] = validate(json.loads((folder / RECORD).read_text(encoding="utf-8")), _SCHEMA)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / RECORD} cannot be read: {error}") from error
    return found


def write(folder: Path, metadata: dict[str, Any]) -> None:
    """Replace the record of a run atomically."""
    write_text(folder / RECORD, json.dumps(metadata, indent=2) + "\n", folder / CHECKPOINTS)


def update(folder: Path, **metadata: Any) -> None:
    """Add keys to the record of a run."""
    write(folder, {**read(folder), **metadata})


def where(metadata: Mapping[str, Any]) -> str:
    """The processor and threads of a run, as benchmarks name theirs; on a GPU the device.

    A run that was resumed elsewhere names both.

    >>> here = {"machine": "a CPU, 2 cores, Linux", "threads": 1}
    >>> where(here), where({**here, "continued": [{"step": 7, "threads": 2}]})
    ('a CPU, 1 thread', 'a CPU, 1 thread, then a CPU, 2 threads')
    """
    parts = [metadata]
    for changed in metadata.get("continued") or []:
        parts.append({**parts[-1], **changed})
    return ", then ".join(dict.fromkeys(map(_machine_and_threads, parts)))


def _machine_and_threads(metadata: Mapping[str, Any]) -> str:
    place = metadata.get("device", "cpu")
    if place == "cpu":
        place = re.sub(r", \d+ cores?, \w+$", "", metadata.get("machine") or "unknown machine")
    threads = metadata.get("threads", "?")
    return f"{place}, {threads} thread{'s' if threads != 1 else ''}"


def record_paths(folder: Path, step: int, paths: list[dict[str, Any]]) -> None:
    """Add which kernels run the layers: under "paths", or under "continued" where a resumed run takes other ones.

    Args:
        folder: the run folder.
        step: step of the checkpoint, 0 at the start.
        paths: as ``kernel_paths`` returns them.
    """
    found = read(folder)
    continued = found.get("continued") or []
    before = next((part["paths"] for part in (*reversed(continued), found) if "paths" in part), None)
    if step == 0:
        update(folder, paths=paths)
    elif paths != before:
        update(folder, continued=[*continued, {"step": step, "paths": paths}])


def mark_checkpointed(folder: Path) -> bool:
    """Record that the run has had a checkpoint, so that a loss of all checkpoints is detected.

    Returns:
        True.
    """
    if not read(folder).get("checkpointed"):
        update(folder, checkpointed=True)
    return True


def resume(folder: Path, step: int, group: Group) -> None:
    """Add changes of the environment since the start or the last resume to the record, under "continued".

    A run that had diverged has not ended any more, and may end otherwise if it is extended.

    Args:
        folder: the run folder.
        step: step of the checkpoint.
        group: the processes of the job.
    """
    found = read(folder)
    continued = found.get("continued") or []
    before = {**found, **{key: value for part in continued for key, value in part.items()}}
    changed = {key: value for key, value in environment(group).items() if before.get(key) != value}
    if changed:
        found["continued"] = [*continued, {"step": step, **changed}]
    if found.pop("diverged", None) is not None or changed:
        write(folder, found)
