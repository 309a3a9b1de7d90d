"""Schedule of feedback rules: "dsf@0.3/gate+1" is dsf for the first 30% of the steps, then gate+1."""

from __future__ import annotations

from torch import nn

from statefeed.feedback import Feedback, FeedbackLike, as_feedback
from statefeed.mixin import FeedbackLayer
from statefeed.model_argument import check_model
from statefeed.user_warning import warn


class Schedule:
    """A sequence of feedback rules, each used until a fraction of training.

    A schedule usually starts with a cheap rule and ends with a better one, such as the exact ``"bptt"``.

    Args:
        spelling: ``"rule@until/rule@until/.../rule"``, with increasing fractions between 0 and 1 and no fraction for
            the last rule. A single rule, in any spelling of ``Feedback``, is used throughout.

    Raises:
        ValueError: an invalid spelling.

    Cost: none until the rule changes.

    Example:
        >>> schedule = Schedule("dsf@0.3/gate+1")
        >>> str(schedule.at(0.29)), str(schedule.at(0.3))
        ('dsf', 'gate+1')
        >>> from torch import nn
        >>> import statefeed as sf
        >>> model = nn.Sequential(sf.GRU(2, 3))
        >>> for step in range(10):
        ...     changed = schedule.apply(model, step / 10)
        ...     # one training step
        >>> str(model[0].feedback)
        'gate+1'
    """

    _warned = False  # that a model has no statefeed layer

    def __init__(self, spelling: FeedbackLike) -> None:
        stages: list[tuple[float, Feedback]] = []
        if isinstance(spelling, str) and ("@" in spelling or "/" in spelling):
            *timed, last = spelling.split("/")
            for stage in timed:
                rule, _, fraction = stage.partition("@")
                stages.append((_fraction(fraction, stage, spelling), Feedback(rule)))
            if "@" in last:
                raise ValueError(
                    f"the last rule of a feedback schedule is used to the end and takes no @, got {spelling!r}"
                )
            stages.append((1.0, Feedback(last)))
        else:
            stages.append((1.0, as_feedback(spelling)))
        fractions = [until for until, _ in stages[:-1]]
        if fractions != sorted(set(fractions)):
            raise ValueError(f"the fractions of a feedback schedule must increase, got {spelling!r}")
        self.stages = tuple(stages)

    def at(self, fraction: float) -> Feedback:
        """The rule used at a point of training.

        Args:
            fraction: completed fraction of training, 0 to 1.

        Returns:
            The rule of the stage that contains the fraction.

        Raises:
            ValueError: the fraction is not between 0 and 1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(
                f"fraction must be the completed part of training, between 0 and 1, got {fraction}: pass step / steps"
            )
        return self._from(fraction)[0]

    def _from(self, fraction: float) -> list[Feedback]:
        """The rules that are used from a fraction on."""
        return [rule for until, rule in self.stages[:-1] if fraction < until] + [self.stages[-1][1]]

    def apply(self, model: nn.Module, fraction: float) -> bool:
        """Set the rule of every statefeed layer in a model.

        Args:
            model: any module.
            fraction: completed fraction of training, 0 to 1; ``step / steps`` before each step.

        Returns:
            Whether the rule of a layer changed.

        Raises:
            TypeError: the first argument is not a module.
            ValueError: the fraction is not between 0 and 1, or a layer does not support the rule or a later one of the
                schedule; then no layer is changed.

        Warns:
            UserWarning: the model has no statefeed layer; once per schedule.
        """
        check_model(model, "apply(model, step / steps)")
        rule = self.at(fraction)
        # Compare by identity first: a comparison by value copies a diagonal from the GPU.
        every_layer = [m for m in model.modules() if isinstance(m, FeedbackLayer)]
        if not every_layer and not self._warned:
            self._warned = True
            warn("the model has no statefeed layer: call sf.swap(model) first")
        layers = [m for m in every_layer if m.feedback is not rule]
        # Also the later rules: training must not end in the middle. A layer may have the first rule already.
        for layer in every_layer if fraction == 0 else layers:
            for later in self._from(fraction):
                reason = layer.unsupported_rule(later)
                if reason is not None:
                    raise ValueError(reason)
        changed = False
        for layer in layers:
            changed |= layer.feedback != rule
            layer.feedback = rule
        return changed

    def __str__(self) -> str:
        return "/".join([*(f"{rule}@{until}" for until, rule in self.stages[:-1]), str(self.stages[-1][1])])

    def __repr__(self) -> str:
        return f"Schedule({str(self)!r})"


def _fraction(text: str, stage: str, spelling: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise ValueError(
            f"a feedback schedule is rule@fraction/.../rule with fractions in (0, 1), got {stage!r} in {spelling!r}"
        )
    return fraction
