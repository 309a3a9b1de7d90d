"""The feedback rule as a value: spellings, errors, equality, and warnings."""

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch

import statefeed as sf
from statefeed.feedback import DIAGONALS, Linearization, TimeVarying

pytestmark = pytest.mark.filterwarnings("ignore:feedback .* adds corrections")

NAMES = ["ft-bptt", "dsf", "calibrated", "fitted", "gate", "jacobian", "ramp(0.95)", "log_spaced(100)"]
LAYERS = [sf.RNN, sf.GRU, sf.LSTM]
SAME_RULE = [
    (None, "bptt"),
    (0.0, "ft-bptt"),
    (0, "ft-bptt"),
    (-0.0, "ft-bptt"),
    (0.5, sf.Feedback(0.5)),
    (1, 1.0),
    ("gate+1", sf.Feedback("gate", corrections=1)),
    ("gate+0", "gate"),
    ("ft-bptt+5", sf.Feedback(0.0, 5)),
    ("jacobian+2", sf.Feedback("jacobian", 2)),
    (torch.tensor([0.25, 0.5]), sf.Feedback(torch.tensor([0.25, 0.5]))),
    (torch.tensor([[0.25, 0.5]]), sf.Feedback(torch.tensor([[0.25, 0.5]]))),
    ("ramp(0.95)", sf.Feedback.ramp(0.95)),
    ("ramp(1)", "dsf"),
    ("ramp(0.90)+2", sf.Feedback.ramp(0.9, corrections=2)),
    ("log_spaced(1e2)", sf.Feedback.log_spaced(100)),
]
REFUSED = [
    "dfs",
    "",
    "+",
    "gate+",
    "gate+-1",
    "gate-1",
    "gate+1.5",
    "gate+1+1",
    "bptt+1",
    "torch+1",
    "fused-bptt",
    "nan",
    "inf",
    math.nan,
    math.inf,
    -math.inf,
    torch.tensor([0.5, math.nan]),
    torch.tensor([0.5, math.inf]),
    torch.zeros(2, 2, 2),
    torch.tensor([[0.5, 0.5], [0.5, math.nan]]),
    torch.tensor(0.5),
    "ramp",
    "ramp()",
    "ramp(x)",
    "ramp(0)",
    "ramp(1.01)",
    "ramp(nan)",
    "ramp(0.5, 0.6)",
    "log_spaced(1)",
    "log_spaced(inf)",
    "log_spaced(-5)",
    torch.zeros(2, dtype=torch.int64),
]


def rule_of(spelling):
    return spelling if isinstance(spelling, sf.Feedback) else sf.Feedback(spelling)


@pytest.mark.parametrize(("one", "other"), SAME_RULE)
def test_two_spellings_of_one_rule_are_equal(one, other):
    assert rule_of(one) == rule_of(other)
    assert hash(rule_of(one)) == hash(rule_of(other))


def test_different_rules_are_different():
    tensors = [torch.tensor([0.5]), torch.tensor([[0.5]]), torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 0.5]])]
    rules = [*NAMES, "torch", "bptt", "gate+1", "gate+2", "dsf+1", "ramp(0.9)", "log_spaced(99)", 0.5, 1.0, *tensors]
    rules = [sf.Feedback(rule) for rule in rules]
    assert len(set(rules)) == len(rules)
    assert all(a != b for n, a in enumerate(rules) for b in rules[:n])
    assert sf.Feedback("gate") != "gate+1"


@pytest.mark.parametrize(
    "name", [n + k for n in NAMES for k in ("", "+1", "+12")] + ["torch", "bptt", "0.5", "-0.5+2", "1e-3"]
)
def test_repr_and_str_parse_to_the_same_rule(name):
    rule = sf.Feedback(name)
    assert eval(repr(rule), {"Feedback": sf.Feedback}) == rule
    assert sf.Feedback(str(rule)) == rule
    assert str(sf.Feedback(str(rule))) == str(rule)


@pytest.mark.parametrize("name", NAMES)
def test_str_is_the_spelling(name):
    assert str(sf.Feedback(name)) == name
    assert str(sf.Feedback(name, corrections=3)) == f"{name}+3"


@pytest.mark.parametrize("rule", ["gate+1", 0.5, "ramp(0.5)", torch.tensor([0.5, 0.25]), torch.tensor([[0.5, 0.25]])])
def test_a_rule_survives_copying_and_pickling(rule):
    rule = sf.Feedback(rule, corrections=2) if isinstance(rule, float) else sf.Feedback(rule)
    for again in (copy.copy(rule), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert again == rule
        assert hash(again) == hash(rule)


def test_a_rule_copies_its_tensor():
    diagonal = torch.tensor([0.5, 0.25])
    rule = sf.Feedback(diagonal)
    before = hash(rule)
    diagonal.zero_()
    assert hash(rule) == before
    assert rule == sf.Feedback(torch.tensor([0.5, 0.25]))
    with pytest.raises(AttributeError):
        rule.corrections = 3


@pytest.mark.parametrize("spelling", REFUSED)
def test_an_invalid_rule_raises(spelling):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        sf.Feedback(spelling)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        sf.GRU(3, 2, feedback=spelling)
    layer = sf.GRU(3, 2, feedback="gate")
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        layer.feedback = spelling
    assert layer.feedback == sf.Feedback("gate")


@pytest.mark.parametrize(
    ("spelling", "meant"),
    [
        ("DSF", "dsf"),
        ("dfs", "dsf"),
        ("gate 1", "gate+1"),
        ("gate1", "gate+1"),
        ("fused", "bptt"),
        ("exact", "bptt"),
        ("none", "bptt"),
        ("ft_bptt", "ft-bptt"),
        ("logspaced(4)+2", "log_spaced(4)+2"),
        ("gate+", "gate"),
        ("bptt +", "bptt"),
    ],
)
def test_a_misspelled_rule_gets_a_suggestion(spelling, meant):
    with pytest.raises(ValueError, match=re.escape(f'got {spelling!r}: did you mean "{meant}"?') + "$"):
        sf.Feedback(spelling)
    assert sf.Feedback(meant)


@pytest.mark.parametrize("spelling", ["nothing", "ramp(x)", "RAMP(x)", "ramp", "", "+"])
def test_no_suggestion_where_no_rule_is_near(spelling):
    with pytest.raises(ValueError, match=r"^(?!.*did you mean)"):
        sf.Feedback(spelling)


@pytest.mark.parametrize("spelling", ["fused-bptt", "fused_bptt", "fused-bptt+1"])
def test_the_error_for_the_old_name_of_the_exact_rule_has_the_new_one(spelling):
    with pytest.raises(ValueError, match=r"^fused-bptt is now bptt: [^\n]+$"):
        sf.Feedback(spelling)


@pytest.mark.parametrize("corrections", [-1, 1.5, True, "1"])
def test_corrections_are_a_count(corrections):
    with pytest.raises(ValueError, match="corrections"):
        sf.Feedback("gate", corrections=corrections)


@pytest.mark.parametrize("rule", [[0.5, 0.5], object(), b"dsf"])
def test_other_types_raise(rule):
    with pytest.raises((TypeError, ValueError), match=r"^[^\n]+$"):
        sf.Feedback(rule)


@pytest.mark.parametrize("cls", LAYERS)
def test_a_diagonal_has_one_value_per_unit_of_the_state(cls):
    width = 6 if cls is sf.LSTM else 3
    right = torch.linspace(-0.5, 0.5, width)
    assert cls(2, 3, feedback=right).feedback == sf.Feedback(right)
    for wrong in (torch.zeros(width - 1), torch.zeros(width + 1), torch.zeros(9 - width), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            cls(2, 3, feedback=wrong)


def stationary(rule, size=5):
    return sf.Feedback(rule).stationary(size, torch.float64, torch.device("cpu"))


def test_a_ramp_rises_evenly_to_its_cap():
    assert stationary("ramp(0.8)").tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert torch.equal(stationary("ramp(1)"), stationary("dsf"))


def test_log_spaced_horizons_are_geometrically_spaced():
    horizons = (1 / (1 - stationary("log_spaced(81)"))).tolist()
    assert horizons == pytest.approx([1.0, 3.0, 9.0, 27.0, 81.0])
    assert stationary("log_spaced(81)", size=1).tolist() == [0.0]


@pytest.mark.parametrize("rule", ["ramp(0.7)", "log_spaced(20)"])
def test_a_spaced_diagonal_is_the_tensor_of_its_values_in_a_layer_over_h_and_c_joined(rule):
    torch.manual_seed(0)
    layer, x = sf.LSTM(2, 3, dtype=torch.float64), torch.randn(6, 2, 2, dtype=torch.float64)
    found = []
    for spelling in (rule, stationary(rule, 6)):
        layer.feedback = spelling
        found.append(torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_row_is_the_rule_of_one_layer_and_direction():
    rows = torch.tensor([[0.25, 0.5], [0.75, 1.0]])
    rule = sf.Feedback(rows, corrections=0)
    assert rule.row(1) == sf.Feedback(rows[1])
    assert str(rule) == "tensor(2x2)"
    assert str(rule.row(0)) == "tensor(2)"
    assert sf.Feedback("gate+1").row(1) == sf.Feedback("gate+1")


def test_an_rnn_has_no_gate():
    with pytest.raises(ValueError, match="gate"):
        sf.RNN(2, 3, feedback="gate")
    layer = sf.RNN(2, 3)
    for rule in ("gate", "gate+1", sf.Feedback("gate", 2)):
        with pytest.raises(ValueError, match="gate"):
            layer.feedback = rule
    assert layer.feedback == sf.Feedback("bptt")


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_has_a_settable_printed_rule(cls):
    layer = cls(2, 3)
    assert layer.feedback == sf.Feedback("bptt")
    for rule in ("torch", None, "ft-bptt", 0.5, "calibrated+1", "jacobian", sf.Feedback("jacobian", 2)):
        layer.feedback = rule
        assert isinstance(layer.feedback, sf.Feedback)
        assert layer.feedback == rule_of(rule)
        assert str(rule_of(rule)) in repr(layer)
        assert "feedback=" in repr(layer)
    with pytest.raises(TypeError):
        cls(2, 3, 1, "tanh", True, False, 0.0, False, None, None, "dsf") if cls is sf.RNN else cls(
            2, 3, 1, True, False, 0.0, False, 0, None, None, "dsf", "dsf"
        )


@pytest.mark.parametrize("diagonal", ["dsf", "log_spaced(64)", "ramp(0.95)", 1.0, torch.tensor([0.1, 0.2, -1.0])])
def test_corrections_around_a_fixed_diagonal_near_one_warn_once(diagonal):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        layer = sf.GRU(2, 3, feedback=sf.Feedback(diagonal, corrections=1))
        for _ in range(3):
            layer(torch.zeros(4, 1, 2))[0].sum().backward()
    assert len(seen) == 1
    assert "calibrated" in str(seen[0].message)
    with pytest.warns(UserWarning, match="calibrated"):
        layer.feedback = sf.Feedback(diagonal, corrections=2)


@pytest.mark.parametrize(
    "rule",
    ["dsf", "calibrated+1", "gate+2", "jacobian+3", "ft-bptt+5", "0.5+1", "torch", 1.0, "fitted+1", "ramp(0.9)+1"],
)
def test_other_rules_do_not_warn(rule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = sf.GRU(2, 3, feedback=rule)
        layer(torch.zeros(4, 1, 2))[0].sum().backward()


def test_a_schedule_is_not_a_rule():
    with pytest.raises(TypeError, match=r"got Schedule: apply a schedule in the training loop, schedule\.apply"):
        sf.GRU(2, 3, feedback=sf.Schedule("dsf@0.3/bptt"))


@dataclass(frozen=True)
class RowsOf(TimeVarying):
    """The rows of another time-varying rule, as a user's rule takes them."""

    rule: TimeVarying

    def rows(self, at: Linearization) -> Sequence[torch.Tensor]:
        return self.rule.rows(at)

    def __str__(self) -> str:
        return f"rows of {self.rule}"


@pytest.mark.parametrize("corrections", [0, 2])
@pytest.mark.parametrize("name", ["gate", "jacobian"])
@pytest.mark.parametrize(
    "make",
    [sf.GRU, sf.LSTM, partial(sf.LSTM, proj_size=2), sf.SLSTM, partial(sf.SLSTM, num_heads=2)],
    ids=["gru", "lstm", "lstm_projected", "slstm", "slstm_heads"],
)
def test_the_rows_of_a_time_varying_rule_are_its_diagonal(make: Callable, name: str, corrections: int) -> None:
    torch.manual_seed(0)
    layer = make(3, 4, bidirectional=True, dtype=torch.float64)
    x, found = torch.randn(6, 2, 3, dtype=torch.float64), []
    for rule in (DIAGONALS[name](), RowsOf(DIAGONALS[name]())):
        layer.feedback = sf.Feedback(rule, corrections)
        found.append(torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())))
    torch.testing.assert_close(*found)
