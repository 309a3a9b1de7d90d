"""Plain torch against statefeed in a package's own training loop: same losses; the ratio of their times is recorded."""

import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import statefeed as sf

Fit = Callable[[bool], tuple[list[float], Any]]


@pytest.fixture
def compare() -> Callable[..., tuple[Any, Any]]:
    """Fits twice in turns, plain and swapped, from the same seed, and compares the losses of every step.

    ``fit(swapped)`` builds and trains a model, and returns its losses and values for the rest of the test. Returned are
    the plain and the swapped result.
    """

    def compare(package: str, model: str, shape: str, fit: Fit, rtol: float = 2e-3, turns: int = 2) -> tuple[Any, Any]:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        losses, results = {}, {}
        torch.set_num_threads(1)
        for _ in range(turns):
            for swapped in (False, True):
                seed()
                start = time.perf_counter()
                losses[swapped], results[swapped] = fit(swapped)
                seconds[swapped].append(time.perf_counter() - start)
        assert len(losses[True]) == len(losses[False]) > 1
        torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=rtol, atol=1e-4)
        record(
            package=package,
            model=model,
            shape=shape,
            # Of whole fits with everything around them, on whatever machine this is: rough.
            fit_ratio=round(min(seconds[False]) / min(seconds[True]), 2),
            losses={"plain": losses[False][-1], "statefeed": losses[True][-1]},
            steps=len(losses[True]),
        )
        return results[False], results[True]

    return compare


def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
    try:
        import numpy as np
    except ModuleNotFoundError:
        return
    np.random.seed(0)  # noqa: NPY002 - the packages draw from the global generator


def record(**fields: Any) -> None:
    """Append a line to the file that `make interop` names; without one, print it."""
    line = json.dumps(
        {**fields, "statefeed": sf.__version__, "torch": torch.__version__, "machine": platform.machine()}
    )
    file = os.environ.get("STATEFEED_INTEROP_RECORDS")
    if file is None:
        print(line)
        return
    with Path(file).open("a", encoding="utf-8") as out:
        out.write(line + "\n")


def losses_of(*bases: type) -> Any:
    """A Lightning callback that keeps the loss of every step in ``losses``."""

    class Losses(*bases):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))

    return Losses()


@pytest.fixture
def losses_callback() -> Callable[..., Any]:
    return losses_of


class Counter(nn.Module):
    """Does a sequence of signs hold more ones than minus ones?  x (B, T, 1) -> (B,), a logit."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.recurrent(x)
        return self.head(y[:, -1]).squeeze(-1)

    def accuracy(self, x: torch.Tensor, y: torch.Tensor) -> float:
        with torch.no_grad():
            return float(((self(x) > 0) == y.bool()).float().mean())


@pytest.fixture
def counter() -> type[Counter]:
    return Counter


@pytest.fixture
def signs() -> tuple[torch.Tensor, torch.Tensor]:
    """x (512, 15, 1) of signs, and whether their sum is above zero."""
    x = torch.randint(0, 2, (512, 15, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return x, (x.sum((1, 2)) > 0).float()
