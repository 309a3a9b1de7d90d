"""Plain torch against statefeed in a package's own training loop: same losses; the times of their steps are recorded.

Two variables come from ``make interop``: STATEFEED_INTEROP_RECORDS names the file of records, and
STATEFEED_INTEROP_TURNS how often each model is fitted both ways.
"""

import datetime
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import statefeed as sf
from statefeed.lm.run import provenance

collect_ignore = ["environments.py", "picture.py", "torchrecurrent_table.py", "torchrecurrent_tasks.py"]  # scripts

_WARM_UP = 2  # steps of a fit that are not timed

Fit = Callable[[bool], tuple[list[float], Any]]


@pytest.fixture
def compare() -> Callable[..., tuple[Any, Any]]:
    """Fits in turns, plain and swapped, from the same seed, and compares the losses of every step.

    ``fit(swapped)`` builds and trains a model, and returns its losses and values for the rest of the test. Returned are
    the plain and the swapped result.
    """

    def compare(package: str, model: str, shape: str, fit: Fit, rtol: float = 2e-3) -> tuple[Any, Any]:
        ms: dict[bool, list[float]] = {False: [], True: []}  # of a step, one value a fit
        losses, results = {}, {}
        torch.set_num_threads(1)
        for _ in range(int(os.environ.get("STATEFEED_INTEROP_TURNS", "2"))):
            for swapped in (False, True):
                seed()
                with step_times() as ends:
                    losses[swapped], results[swapped] = fit(swapped)
                steps = [after - before for before, after in itertools.pairwise(ends)]
                ms[swapped].append(1e3 * statistics.median(steps[_WARM_UP:] or steps))
        assert len(losses[True]) == len(losses[False]) > 1
        torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=rtol, atol=1e-4)
        record(
            package=package,
            model=model,
            shape=shape,
            step_ms={name: spread(ms[swapped]) for name, swapped in (("plain", False), ("statefeed", True))},
            step_ratio=spread([plain / ours for plain, ours in zip(ms[False], ms[True], strict=True)]),
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


@contextmanager
def step_times() -> Iterator[list[float]]:
    """When each step of any optimizer ended: a whole step, with whatever the package does in it, lies between two."""
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        yield ends
    finally:
        hook.remove()


def spread(values: list[float]) -> dict[str, float]:
    return {name: round(of(values), 4) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def record(package: str, **fields: Any) -> None:
    """Append a line to the file that `make interop` names; without one, print it."""
    line = json.dumps({"package": package, **fields, **provenance_of(package)})
    file = os.environ.get("STATEFEED_INTEROP_RECORDS")
    if file is None:
        print(line)
        return
    with Path(file).open("a", encoding="utf-8") as out:
        out.write(line + "\n")


def provenance_of(package: str) -> dict[str, Any]:
    """Versions, commit, processor, threads and date of a record."""
    return {
        "versions": {name: version(name) for name in (package, "torch")} | {"statefeed": sf.__version__},
        **provenance.commit(),
        "cpu": provenance.processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


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
