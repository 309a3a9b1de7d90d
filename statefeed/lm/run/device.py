"""The device that a model runs on and the dtype of its products there."""

from typing import Any

import torch

from statefeed.lm.errors import require


def resolve_device(requested: str, flag: str = "train.device") -> torch.device:
    """The device that a flag names.

    Args:
        requested: cpu, cuda, or auto for cuda where there is one and cpu elsewhere.
        flag: the name of the flag.

    Raises:
        UsageError: for cuda where torch sees no GPU; there is no fallback.
    """
    available = torch.cuda.is_available()
    require(available or requested != "cuda", f"{flag} must be auto or cpu here, where torch sees no GPU", requested)
    return torch.device("cuda" if available and requested != "cpu" else "cpu")


def autocast_context(precision: str, device: torch.device) -> torch.autocast:
    """The context in which products are computed in a precision.

    Raises:
        UsageError: for float16 on a CPU.
    """
    require(
        precision != "float16" or device.type == "cuda",
        "train.precision=float16 needs a GPU, a CPU has bfloat16: train.device must be cuda",
        device.type,
    )
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def device_metadata(device: torch.device) -> dict[str, Any]:
    """What a run's record says of its device; on a GPU, whether float32 products may be computed in TF32 too."""
    if device.type != "cuda":
        return {"device": device.type}
    backends: Any = torch.backends
    tf32 = {"products": backends.cuda.matmul.fp32_precision, "cudnn": backends.cudnn.rnn.fp32_precision}
    return {"device": torch.cuda.get_device_name(device), "tf32": tf32}
