"""The most memory that this process has held."""

import contextlib
import re
import sys
from pathlib import Path


def reset_peak() -> None:
    """Count the most memory from here on, where the system can: reading and encoding the text may take more."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """The most memory that this process has held, None where the system does not report it."""
    with contextlib.suppress(OSError):  # where the system is Linux: what a parent held at a fork does not count there
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
