"""Hugging Face Trainer callback that calls ``swap`` when training starts, with optional schedule and monitor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

import statefeed as sf

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "statefeed.integrations.transformers needs transformers, which is not installed: "
        'pip install "statefeed[transformers]"'
    ) from error


class SwapCallback(TrainerCallback):  # type: ignore[misc]
    """Swaps the recurrent layers of the Trainer's model when training starts.

    Args:
        feedback: the rule, in any spelling of ``Feedback``; if None, torch's layers become exact and statefeed layers
            keep their rule.
        schedule: rules of the swapped layers that change during training, in place of ``feedback``: a ``Schedule`` or
            its spelling.
        monitor: a ``Monitor``, called before every optimizer step with the model; its values are in
            ``trainer.state.log_history``.
        include: patterns of layer names, as for ``swap``.
        exclude: patterns of layer names to leave unchanged.

    Attributes:
        report: the ``SwapReport`` of the last training; None before.

    Gradient: that of the rule, from the first training step on.

    Raises:
        ImportError: the module is imported and transformers is not installed.
        ValueError: both a rule and a schedule, an unknown rule, a pattern that matches no layer, or, before the first
            step, a rule of the schedule that a swapped layer does not support.

    Cost: none per step without a monitor.

    Example:
        >>> from statefeed.integrations.transformers import SwapCallback
        >>> trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[SwapCallback()])
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
        if feedback is not None and schedule is not None:
            raise ValueError(f"feedback and schedule exclude each other, got {str(feedback)!r} and {str(schedule)!r}")
        self.schedule = sf.Schedule(schedule) if isinstance(schedule, str) else schedule
        rule = feedback if self.schedule is None else self.schedule.at(0.0)
        self.feedback = rule if rule is None or isinstance(rule, sf.Feedback) else sf.Feedback(rule)
        self.monitor = monitor
        # Tuples, because a second training cannot read an iterator again.
        self.include, self.exclude = (names if isinstance(names, str) else tuple(names) for names in (include, exclude))
        self.report: sf.SwapReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.report = sf.swap(model, self.feedback, include=self.include, exclude=self.exclude)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.schedule is not None and self.report is not None:
            layers = nn.ModuleList(model.get_submodule(name) for name in self.report.swapped)
            self.schedule.apply(layers, min(state.global_step / state.max_steps, 1.0))
        if self.monitor is not None:
            numbers = self.monitor(model, state.global_step)
            if numbers:
                state.log_history.append({**numbers, "step": state.global_step})
