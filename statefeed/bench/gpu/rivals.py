"""Other packages, if they are installed: FlashRNN's layers, and the scan of accelerated-scan."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed.bench.gpu.stage import Options
from statefeed.bench.gpu.timing import Work, measure

# FlashRNN's gates, and its gates that depend on the input.
_GATES = {"gru": (4, 3), "lstm": (4, 4)}
_SHAPES = ((256, 128, 512), (1024, 8, 256))


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after this time, because a package may compile itself at its first call."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not finished after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def flashrnn(options: Options) -> Iterator[dict[str, Any]]:
    """Time FlashRNN's exact BPTT in bfloat16, including the input product; FlashRNN compiles itself with nvcc."""
    for cell in _GATES:
        for T, B, H in _SHAPES:
            shape = {"cell": cell, "T": T, "B": B, "H": H}
            record = {**shape, "dtype": "bfloat16", "device": options.device, "contender": "flashrnn"}
            if find_spec("flashrnn") is None:
                yield {**record, "not_run": "flashrnn is not installed"}
                continue
            if options.time_left() <= 1:
                yield {**record, "not_run": "no time left"}
                continue
            try:
                with time_limit(options.time_left()):
                    work = {"flashrnn": _flashrnn_work(cell, T, B, H)}
                    times = measure(work, options.rounds, options.device, without_graph=work)
            except Exception as error:  # errors of another package are recorded, not raised
                yield {**record, "not_run": f"{type(error).__name__}: {error}"}
                continue
            found = times["flashrnn"]
            if "failed" in found:
                found = {"not_run": found["failed"]}
            yield {**record, "repeats": options.rounds, **found}


def _flashrnn_work(cell: str, T: int, B: int, H: int) -> Work:
    from flashrnn import flashrnn

    recurrent, fed = _GATES[cell]
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, grad = torch.randn(B, T, H, **options).requires_grad_(), torch.randn(B, T, H, **options)
    bound = H**-0.5
    w = torch.empty(fed * H, H, **options).uniform_(-bound, bound).requires_grad_()
    R = torch.empty(3 if cell == "gru" else recurrent, 1, H, H, **options).uniform_(-bound, bound).requires_grad_()
    b = torch.empty(recurrent, 1, H, **options).uniform_(-bound, bound).requires_grad_()

    def forward() -> Tensor:
        Wx = F.linear(x, w).view(B, T, fed, 1, H)
        states, _ = flashrnn(Wx, R, b, function=cell, backend="cuda_fused", dtype="bfloat16")
        y: Tensor = states[0].reshape(B, T, H)
        return y

    return Work(forward, lambda y: torch.autograd.grad(y, [x, w, R, b], grad.to(y.dtype)))


def accelerated_scan(x: Tensor, a: Tensor, seconds: float) -> Callable[[], Tensor]:
    """A reverse scan by accelerated-scan, which takes (B, C, T) and runs forward; inputs are rearranged before timing.

    Args:
        x: (T, S).
        a: (S,) or (T, S).
        seconds: time limit for the compilation.

    Returns:
        A call that returns (1, S, T), time in reverse.

    Raises:
        ImportError: the package is not installed.
        Exception: any error of the package.
    """
    from accelerated_scan.scalar import scan

    gates, tokens = (value.flip(0).T.contiguous()[None] for value in (a.expand_as(x), x))
    with time_limit(seconds):
        scan(gates, tokens)

    def run() -> Tensor:
        y: Tensor = scan(gates, tokens)
        return y

    return run
