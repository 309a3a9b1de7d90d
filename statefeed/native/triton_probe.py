"""Check that Triton kernels run on this machine, by one tiny launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The minimum that Triton documents; Triton does not check it and fails during compilation.
MINIMUM_CAPABILITY = (8, 0)


def probe(device: torch.device | None = None) -> str:
    """Launch one tiny kernel and check its output.

    The first launch of a process compiles Triton's launcher with a C compiler and Python's headers. Without them the
    launch fails, but importing Triton does not.

    Args:
        device: a CUDA device, the current one if None.

    Returns:
        The version of Triton, for example ``"Triton 3.7.1"``.

    Raises:
        RuntimeError: the device is too old, or the launch failed or gave a wrong result; the message names the cause.

    Cost: about a second in a process whose caches are empty, a millisecond otherwise; one synchronization.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            raise RuntimeError(
                f"Triton needs a GPU of compute capability {_dotted(MINIMUM_CAPABILITY)} or higher, "
                f"{torch.cuda.get_device_name(device)} has {_dotted(capability)}"
            )
    try:
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            found = torch.zeros(1, dtype=torch.int32, device=device)
            write_one[(1,)](found)
            value = int(found)
    except Exception as error:  # the compiler, its subprocess and the driver raise different types
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"a Triton kernel could not be launched ({type(error).__name__}: {cause}); the first launch needs a C "
            "compiler and Python's headers"
        ) from error
    if value != 1:
        raise RuntimeError(f"a Triton kernel wrote {value}, expected 1")
    return f"Triton {triton.__version__}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@triton.jit
def write_one(out):
    """Write 1 to ``out``."""
    tl.store(out, 1)
