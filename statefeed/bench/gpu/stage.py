"""Entry point of one stage in a separate process: writes its records, including failures."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from statefeed.bench.gpu.records import Records

# Each is a module with run(Options), which yields records; the record of a failure has the key "failed".
STAGES = ("preflight", "parity", "layers", "scan", "training", "forward")


class Options(NamedTuple):
    """Options of a stage.

    Attributes:
        device: cpu or cuda.
        smoke: tiny shapes, one repetition.
        deadline: value of ``time.monotonic`` after which no new work is started.
    """

    device: str
    smoke: bool
    deadline: float

    @property
    def rounds(self) -> int:
        """Repetitions of every timing."""
        return 1 if self.smoke else 5

    def time_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def main(argv: Sequence[str]) -> int:
    """Run a stage.

    Args:
        argv: stage name, device, folder of the records, seconds until the deadline and, for tiny shapes, "smoke".

    Returns:
        Exit code: 0; 1 if the stage failed or one of its records is a failure.
    """
    name, device, folder, seconds, *smoke = argv
    options = Options(device, bool(smoke), time.monotonic() + float(seconds))
    records, failed = Records(name, device, Path(folder)), 0
    try:
        for record in importlib.import_module(f"statefeed.bench.gpu.{name}").run(options):
            records.append(record)
            failed += "failed" in record
    except Exception as error:
        traceback.print_exc()
        records.append({"failed": f"{type(error).__name__}: {error}"})
        failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
