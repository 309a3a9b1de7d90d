"""Safetensors files with atomic writes and a checksum of the content."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from statefeed.lm import migration
from statefeed.lm.atomic_file import replacement
from statefeed.lm.errors import CorruptFile


def write(path: Path, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically.

    Args:
        path: path of the file.
        folder: folder of the temporary file, in the same file system.
        tensors: tensors by name.
        metadata: values that JSON can represent, saved in the header of the file with a checksum of its content.
    """
    text = json.dumps(metadata)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacement(path, folder) as unfinished:
            save_file(contiguous, unfinished, {"metadata": text, "sha256": _digest(contiguous, text)})
            unfinished.chmod(_new_file_mode())  # safetensors gives access to the user alone
    except SafetensorError as error:  # its message contains the error number of the system
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else 0, os.strerror(int(code[1])) if code else str(error), path) from error


def _new_file_mode() -> int:
    """The permissions of a new file, which depend on the umask of the process."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of a file of `write`.

    Raises:
        CorruptFile: the file is not readable or its checksum does not match.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} is broken, perhaps by a full disk: {' '.join(str(error).split())}") from error
    text = migration.tensor_file(header)
    if header.get("sha256") != _digest(tensors, text):
        raise CorruptFile(f"{path} is broken: its content has changed since it was written")
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """sha256 of the content: metadata, names, dtypes, shapes and values."""
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
