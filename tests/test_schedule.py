"""Schedules of rules: spelling, the rule at a fraction, and setting it in a model."""

import pytest
import torch
from torch import nn

import statefeed as sf


def test_the_rule_at_a_fraction() -> None:
    schedule = sf.Schedule("dsf@0.25/gate@0.5/gate+1")
    assert [str(schedule.at(f)) for f in (0.0, 0.24, 0.25, 0.49, 0.5, 0.99, 1.0)] == [
        *["dsf"] * 2,
        *["gate"] * 2,
        *["gate+1"] * 3,
    ]
    assert str(schedule) == "dsf@0.25/gate@0.5/gate+1"


def test_a_schedule_prints_its_fractions_exactly() -> None:
    spelling = "dsf@0.12345678/gate@0.12345679/bptt"
    assert str(sf.Schedule(spelling)) == spelling


@pytest.mark.parametrize("rule", ["jacobian+2", 0.5, None, torch.full((3,), 0.5), sf.Feedback("gate")])
def test_a_single_rule_is_used_throughout(rule: object) -> None:
    schedule = sf.Schedule(rule)
    assert schedule.at(0.0) == schedule.at(1.0) == (rule if isinstance(rule, sf.Feedback) else sf.Feedback(rule))


def test_apply_changes_every_layer_once() -> None:
    model = nn.ModuleList([sf.GRU(2, 3), sf.LSTM(2, 3), sf.Recurrent(nn.GRUCell(2, 3)), nn.GRU(2, 3)])
    schedule = sf.Schedule("dsf@0.5/bptt")
    assert schedule.apply(model, 0.4)
    assert not schedule.apply(model, 0.49)
    assert schedule.apply(model, 0.5)
    assert all(layer.feedback.exact for layer in model[:3])
    assert not schedule.apply(model, 0.9)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("dsf@0.5", "takes no @"),
        ("dsf/gate", r"in \(0, 1\), got 'dsf'"),
        ("dsf@30/gate", r"in \(0, 1\), got 'dsf@30'"),
        ("dsf@x/gate", r"in \(0, 1\)"),
        ("dsf@0.5/gate@0.4/bptt", "must increase"),
        ("dfs@0.5/gate", "feedback must be"),
    ],
)
def test_unsupported_uses_raise(spelling: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.Schedule(spelling)


def test_a_later_rule_that_a_layer_does_not_support_raises_at_the_first_step() -> None:
    model = nn.ModuleList([sf.GRU(2, 3, feedback="dsf"), sf.RNN(2, 3, feedback="dsf")])
    for spelling in ("dsf@0.5/gate", "jacobian@0.5/gate@0.6/bptt"):
        with pytest.raises(ValueError, match="direct path"):
            sf.Schedule(spelling).apply(model, 0.0)
        assert [str(layer.feedback) for layer in model] == ["dsf", "dsf"]
    # An earlier rule does not matter to a training that continues.
    assert sf.Schedule("gate@0.5/bptt").apply(model, 0.7)
