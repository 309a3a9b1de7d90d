"""statefeed bench adding: the task, its records and the choice of the rate."""

import json

import pytest
import torch

from statefeed.bench import adding, main
from statefeed.bench.adding import Evaluation, Run
from statefeed.bench.options import OptionError


def test_the_target_is_the_sum_of_one_number_of_each_half():
    x, target = adding.sequences(9, 300, torch.Generator().manual_seed(0))
    values, marks = x.unbind(-1)
    assert x.shape == (9, 300, 2)
    assert (marks[:4].sum(0) == 1).all()
    assert (marks[4:].sum(0) == 1).all()
    assert (marks.sum(1) > 0).all()  # every step is marked somewhere
    for column in range(300):
        first, second = marks[:, column].nonzero().flatten().tolist()
        assert target[column] == values[first, column] + values[second, column]
    assert abs(float((target - 1).square().mean()) - 1 / 6) < 0.03


def test_smoke(tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    rules = ["dsf", "log_spaced(6)@0.6/bptt"]
    assert main(["adding", "--smoke", "--cells=gru,lstm", f"--rules={','.join(rules)}", f"--output={output}"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["cell"], r["variant"]) for r in records] == [(cell, rule) for cell in ("gru", "lstm") for rule in rules]
    for record in records:
        assert (record["bench"], record["T"], record["H"], record["steps"], record["seed"]) == ("adding", 6, 8, 4, 1)
        assert record["curve"][-1][:2] == [4, record["error"]]
        assert str(record["lr"]) in record["rates"]
        assert {"commit", "machine", "threads", "versions", "command"} <= record.keys()
    assert "log_spaced(6)@0.6/bptt" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 1000


def test_a_gru_learns_short_sequences():
    curve = adding.train(Run("gru", "bptt", 1, 1e-2), adding.Options(length=20, width=32, steps=400))
    assert curve[0].error > 0.1
    assert curve[-1].error < 0.02


def test_the_schedule_is_applied():
    options = adding.Options(length=20, width=16, steps=10)
    curves = [adding.train(Run("gru", rule, 1, 1e-2), options) for rule in ("ft-bptt@0.5/bptt", "ft-bptt", "bptt")]
    errors = [[e.error for e in curve] for curve in curves]
    assert errors[0][:5] == errors[1][:5]
    assert errors[0][5:] != errors[1][5:]
    assert errors[0][:5] != errors[2][:5]


def test_the_rate_is_the_best_of_the_grid_and_solved_the_first_small_error(monkeypatch):
    calls = []

    def train(run, options):
        calls.append(run)
        fast = run.rate == 2e-3
        return [Evaluation(5, 0.2, 1.0), Evaluation(10, 0.01 if fast else 0.1, 2.0), Evaluation(15, 0.02, 3.0)]

    monkeypatch.setattr(adding, "train", train)
    records = list(adding.run(adding.Options(rules="dsf")))
    assert [(run.seed, run.rate) for run in calls] == [(0, 1e-3), (0, 2e-3), (0, 4e-3)] + [
        (seed, 2e-3) for seed in range(1, 6)
    ]
    assert {(r["lr"], r["error"], r["learnt"], r["cpu_seconds"]) for r in records} == {(2e-3, 0.02, 10, 2.0)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": 1},
        {"width": 0},
        {"steps": 0},
        {"rules": "fast"},
        {"rules": "dsf@2/bptt"},
        {"cells": "rnn", "rules": "gate"},
        {"rates": "quick"},
        {"rates": "0"},
        {"repeats": 2},
    ],
)
def test_user_errors(wrong):
    with pytest.raises(OptionError, match=r"^[^\n]+$"):
        adding.Options(**wrong)
