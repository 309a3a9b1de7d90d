"""Owns the device: which one a model runs on, how products are narrowed there, how batches get there from the CPU."""

from typing import Any

import torch

from statefeed.lm.config import require


def chosen(wish: str, flag: str = "train.device") -> torch.device:
    """The device that a wish names.

    Args:
        wish: cpu, cuda, or auto for cuda where there is one and cpu elsewhere.
        flag: what the wish is called.

    Raises:
        UsageError: for cuda where torch sees no GPU; nothing else is taken in its place.
    """
    there = torch.cuda.is_available()
    require(there or wish != "cuda", f"{flag} must be auto or cpu here, where torch sees no GPU", wish)
    return torch.device("cuda" if there and wish != "cpu" else "cpu")


def narrowed(precision: str, device: torch.device) -> torch.autocast:
    """The context in which products are made in a precision.

    Raises:
        UsageError: for float16 on a CPU.
    """
    require(
        precision != "float16" or device.type == "cuda",
        "train.precision=float16 needs a GPU, a CPU has bfloat16: train.device must be cuda",
        device.type,
    )
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def described(device: torch.device) -> dict[str, Any]:
    """What a run's record says of its device; on a GPU, whether float32 products may be computed in TF32 too."""
    if device.type != "cuda":
        return {"device": device.type}
    backends: Any = torch.backends
    tf32 = {"products": backends.cuda.matmul.fp32_precision, "cudnn": backends.cudnn.rnn.fp32_precision}
    return {"device": torch.cuda.get_device_name(device), "tf32": tf32}
