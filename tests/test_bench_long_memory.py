"""The tasks of long memory: training, the choice of the learning rate, records, table and figure."""

import json
import math

import pytest
import torch

from statefeed.bench import long_memory
from statefeed.bench.adding import Adding
from statefeed.bench.long_memory import Evaluation, Run
from statefeed.bench.long_memory_cells import LAYERS
from statefeed.bench.long_memory_options import AddingOptions, RecallOptions
from statefeed.bench.recall import Recall


def test_the_schedule_is_applied():
    options = AddingOptions(width=16, steps=10)
    rules = ("ft-bptt@0.5/bptt", "ft-bptt", "bptt")
    curves = [long_memory.train(Run("gru", rule, 1, 1e-2), Adding(20), options) for rule in rules]
    scores = [[e.score for e in curve] for curve in curves]
    assert scores[0][:5] == scores[1][:5]
    assert scores[0][5:] != scores[1][5:]
    assert scores[0][:5] != scores[2][:5]


def trained(score_of_rate, calls):
    """A replacement of ``train`` whose score depends on the rate."""

    def train(run, task, options):
        calls.append(run)
        return [Evaluation(5, score_of_rate(run.rate), 1.0)]

    return train


def test_the_best_rate_inside_the_grid_is_taken_and_tuning_has_its_own_seed(monkeypatch):
    calls = []

    def train(run, task, options):
        calls.append(run)
        fast = run.rate == 4e-3
        return [Evaluation(5, 0.2, 1.0), Evaluation(10, 0.01 if fast else 0.1, 2.0), Evaluation(15, 0.02, 3.0)]

    monkeypatch.setattr(long_memory, "train", train)
    records = list(long_memory.run(AddingOptions(rules="dsf")))
    assert [(run.seed, run.rate, run.tuning) for run in calls] == [(0, rate, True) for rate in (2e-3, 4e-3, 8e-3)] + [
        (seed, 4e-3, False) for seed in range(1, 6)
    ]
    assert {(r["lr"], r["error"], r["learnt"], r["cpu_seconds"]) for r in records} == {(4e-3, 0.02, 10, 2.0)}
    assert [r["rates"].keys() for r in records] == [{2e-3, 4e-3, 8e-3}] * 5


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (8e-3, [2e-3, 4e-3, 8e-3, 16e-3]),
        (16e-3, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),
        (32e-3, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),  # at most twice
        (1e-3, [2e-3, 4e-3, 8e-3, 1e-3, 5e-4]),
    ],
)
@pytest.mark.parametrize(("task", "options", "sign"), [(Adding, AddingOptions(), 1), (Recall, RecallOptions(), -1)])
def test_the_grid_is_extended_where_its_edge_is_best(monkeypatch, best, tried, task, options, sign):
    calls = []
    monkeypatch.setattr(long_memory, "train", trained(lambda rate: sign * abs(math.log(rate / best)), calls))
    rate, scores = long_memory.best_rate("gru", "dsf", task(6), options)
    assert rate == pytest.approx(best)
    assert list(scores) == pytest.approx(tried)
    assert [run.rate for run in calls] == list(scores)


def test_a_rate_whose_training_diverges_loses(monkeypatch):
    calls = []
    monkeypatch.setattr(long_memory, "train", trained(lambda rate: None if rate > 3e-3 else 0.1 + rate, calls))
    rate, scores = long_memory.best_rate("gru", "dsf", Adding(6), AddingOptions())
    assert (rate, scores[4e-3], scores[8e-3]) == (5e-4, None, None)
    monkeypatch.setattr(long_memory, "train", trained(lambda rate: None, calls))
    rate, scores = long_memory.best_rate("gru", "dsf", Recall(6), RecallOptions())
    assert (rate, set(scores.values())) == (5e-4, {None})


def test_a_single_rate_is_not_tuned(monkeypatch):
    monkeypatch.setattr(long_memory, "train", None)
    assert long_memory.best_rate("gru", "dsf", Adding(6), AddingOptions(rates="0.1")) == (0.1, {})


def test_training_that_diverges_stops_and_has_no_score_from_there_on():
    class Overflows(Adding):
        losses = 0

        def loss(self, output, target):
            self.losses += output.requires_grad
            return super().loss(output, target) * (math.inf if self.losses == 3 else 1)

    task = Overflows(6)
    curve = long_memory.train(Run("gru", "dsf", 1, 1e-2), task, AddingOptions(width=8, steps=5))
    assert [e.step for e in curve] == [1, 2, 3, 4, 5]
    assert [e.score is None for e in curve] == [False, False, True, True, True]
    assert task.losses == 3  # the rest of the training is left out


@pytest.mark.parametrize(("task", "key"), [(Adding, "error"), (Recall, "accuracy")])
def test_an_output_that_is_not_finite_has_no_score(monkeypatch, task, key):
    def nan(self, x):
        answer = forward(self, x)
        return answer if torch.is_grad_enabled() else answer * math.nan

    forward = long_memory.Model.forward
    monkeypatch.setattr(long_memory.Model, "forward", nan)
    options = (AddingOptions if task is Adding else RecallOptions)(length=6, width=8, steps=2, rules="dsf", repeats=3)
    records = list(long_memory.run(options))
    assert [(r[key], r["learnt"], r["cpu_seconds"]) for r in records] == [(None, None, None)] * 3
    assert "NaN" not in json.dumps(records)
    meta = {"machine": {"gpu": None, "cpu": "a CPU"}, "threads": 1, "versions": {"torch": "2"}}
    records = [{**r, **meta} for r in json.loads(json.dumps(records))]
    assert long_memory.table(records).row_count == 1
    assert long_memory.figure(records).axes


@pytest.mark.parametrize(("task", "solved", "unsolved"), [(Adding, 0.01, 0.0101), (Recall, 0.9, 0.899)])
def test_a_task_is_solved_from_its_bound_on(task, solved, unsolved):
    assert task.is_solved(solved)
    assert not task.is_solved(unsolved)


def test_the_forget_gates_of_an_lstm_begin_open():
    options = AddingOptions(cells="lstm,lstm-forget-1", length=6, steps=1)
    assert options.cells.split(",") == ["lstm", "lstm-forget-1"]
    torch.manual_seed(0)
    usual = LAYERS["lstm"](2, 3)
    torch.manual_seed(0)
    open_gates = LAYERS["lstm-forget-1"](2, 3)
    for name, value in usual.named_parameters():
        if name.startswith("bias"):
            value.data[3:6] = 1.0 if name == "bias_ih_l0" else 0.0
        assert torch.equal(open_gates.get_parameter(name), value), name
