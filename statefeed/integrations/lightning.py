"""Lightning callback that calls ``swap`` when fitting starts, with an optional schedule and alignment monitor."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any

from torch import nn

import statefeed as sf


def _callback_classes() -> tuple[type, ...]:
    """``Callback`` of Lightning under both of its package names; other packages use one or the other."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
    if not found:
        raise ImportError(
            "statefeed.integrations.lightning needs lightning or pytorch-lightning, which is not installed: "
            'pip install "statefeed[lightning]"'
        )
    return tuple(found)


class SwapCallback(*_callback_classes()):  # type: ignore[misc]
    """Swaps the recurrent layers of a LightningModule when fitting starts.

    Suitable for packages that create their network late, such as darts and neuralforecast: when fitting starts, the
    network exists and is not compiled yet. Statefeed layers keep their rule unless one is set here.

    Args:
        feedback: the rule, in any spelling of ``Feedback``; exact for torch's layers if None.
        schedule: rules of the swapped layers that change during training, in place of ``feedback``: a ``Schedule`` or
            its spelling.
        monitor: a ``Monitor``, called before every optimizer step with the LightningModule; its values are logged.
        include: patterns of layer names, as for ``swap``.
        exclude: patterns of layer names to leave unchanged.

    Attributes:
        report: the ``SwapReport`` of the last fit; None before.

    Gradient: that of the rule, from the first training step on.

    Raises:
        ImportError: the module is imported and lightning is not installed.
        ValueError: both a rule and a schedule, an unknown rule, a pattern that matches no layer, or, when fitting
            starts, a schedule without a limit of steps, or of epochs of a dataset with a length; or before the first
            step, a rule of the schedule that a swapped layer does not support.

    Cost: none per step without a monitor.

    Example:
        >>> from statefeed.integrations.lightning import SwapCallback
        >>> trainer = lightning.Trainer(max_epochs=5, callbacks=[SwapCallback(schedule="dsf@0.5/bptt")])
    """

    def __init__(
        self,
        feedback: Any = None,
        *,
        schedule: sf.Schedule | str | None = None,
        monitor: sf.Monitor | None = None,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
    ) -> None:
        super().__init__()
        if feedback is not None and schedule is not None:
            raise ValueError(f"feedback and schedule exclude each other, got {str(feedback)!r} and {str(schedule)!r}")
        self.schedule = sf.Schedule(schedule) if isinstance(schedule, str) else schedule
        rule = feedback if self.schedule is None else self.schedule.at(0.0)
        self.feedback = rule if rule is None or isinstance(rule, sf.Feedback) else sf.Feedback(rule)
        self.monitor = monitor
        # Tuples, because a second fit cannot read an iterator again.
        self.include, self.exclude = (names if isinstance(names, str) else tuple(names) for names in (include, exclude))
        self.report: sf.SwapReport | None = None
        self._last_step = -1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Without a limit the number is infinite, and -1 if the limit is epochs of a dataset without a length.
        if self.schedule is not None and not 0 <= trainer.estimated_stepping_batches < math.inf:
            raise ValueError(
                "a schedule needs the length of training: set max_steps of the Trainer, or max_epochs if the dataset "
                "has a length"
            )
        self.report = sf.swap(pl_module, self.feedback, include=self.include, exclude=self.exclude)
        self._last_step = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # With accumulated gradients one optimizer step has several batches.
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self.schedule is not None and self.report is not None:
            layers = nn.ModuleList(pl_module.get_submodule(name) for name in self.report.swapped)
            self.schedule.apply(layers, _fraction(trainer, batch_idx))
        if self.monitor is not None:
            pl_module.log_dict(self.monitor(pl_module, trainer.global_step))

    def __getstate__(self) -> dict[str, Any]:
        # darts pickles the callback with the model; the report refers to the layers of this process.
        return {**vars(self), "report": None}


def _fraction(trainer: Any, batch_idx: int) -> float:
    """The completed fraction of training, by the limit that is nearer."""
    steps, epochs = 0.0, 0.0
    if trainer.max_steps > 0:
        steps = trainer.global_step / trainer.max_steps
    # Not by steps: with manual optimization an epoch has any number of them.
    if trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
        batches = trainer.num_training_batches
        epochs = (trainer.current_epoch * batches + batch_idx) / (trainer.max_epochs * batches)
    return min(max(steps, epochs), 1.0)
