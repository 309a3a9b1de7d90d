"""The device of a run and its autocast context."""

from typing import Any

import torch

from statefeed.lm.errors import require


def resolve_device(requested: str, flag: str = "train.device") -> torch.device:
    """The device that a flag selects.

    Args:
        requested: cpu, cuda, or auto, which is cuda if available and cpu otherwise.
        flag: name of the flag, for the error message.

    Raises:
        UsageError: cuda is requested and torch sees no GPU; there is no fallback.
    """
    available = torch.cuda.is_available()
    require(available or requested != "cuda", f"{flag} must be auto or cpu here, where torch sees no GPU", requested)
    return torch.device("cuda" if available and requested != "cpu" else "cpu")


def autocast_context(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a precision; disabled for float32.

    Raises:
        UsageError: float16 on a CPU.
    """
    require(
        precision != "float16" or device.type == "cuda",
        "train.precision=float16 needs a GPU, a CPU has bfloat16: train.device must be cuda",
        device.type,
    )
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def device_metadata(device: torch.device) -> dict[str, Any]:
    """Metadata of a device for the record of a run; on a GPU also whether float32 products may use TF32."""
    if device.type != "cuda":
        return {"device": device.type}
    backends: Any = torch.backends
    tf32 = {"products": backends.cuda.matmul.fp32_precision, "cudnn": backends.cudnn.rnn.fp32_precision}
    return {"device": torch.cuda.get_device_name(device), "tf32": tf32}
