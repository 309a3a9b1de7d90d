"""TensorBoard, an optional dependency."""

from typing import Any

from statefeed.lm.errors import UsageError


def writer_class() -> Any:
    """TensorBoard's SummaryWriter.

    Raises:
        UsageError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError('run.tensorboard needs TensorBoard: pip install "statefeed[tensorboard]"') from None
    return SummaryWriter
