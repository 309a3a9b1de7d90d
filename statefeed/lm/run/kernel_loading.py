"""Loading of the CPU kernels before the first training step, with a notice if they must be compiled."""

import threading

import torch

from statefeed import native as kernels
from statefeed.lm.run.log import Log

NOTICE_DELAY = 3.0  # seconds; loading kernels takes less, compiling them takes longer


def load_kernels(device: torch.device, log: Log) -> None:
    """Load the CPU kernels before the first step, and print a notice if they must be compiled.

    The GPU kernels are compiled one by one when they are launched.
    """
    if device.type != "cpu":
        return
    notice = threading.Timer(NOTICE_DELAY, log.print, ["compiling the kernels for this machine, which is done once"])
    notice.daemon = True
    notice.start()
    try:
        kernels.available()
    finally:
        notice.cancel()
