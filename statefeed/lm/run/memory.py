"""Peak memory of this process."""

import contextlib
import re
import sys
from pathlib import Path


def reset_peak() -> None:
    """Reset the peak, on Linux, because reading and encoding the text may need more memory than training."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Peak resident memory of this process in bytes; None if the system does not report it."""
    with contextlib.suppress(OSError):  # on Linux; unlike ru_maxrss it does not include a parent's memory at a fork
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
