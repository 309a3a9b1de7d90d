"""statefeed bench adding: the task."""

import json

import pytest
import torch

from statefeed.bench import long_memory, main
from statefeed.bench.adding import Adding
from statefeed.bench.long_memory import Run
from statefeed.bench.long_memory_options import AddingOptions
from statefeed.bench.options import OptionError


def test_the_target_is_the_sum_of_one_number_of_each_half():
    x, target = Adding(9).draw(300, torch.Generator().manual_seed(0))
    values, marks = x.unbind(-1)
    assert x.shape == (9, 300, 2)
    assert (marks[:4].sum(0) == 1).all()
    assert (marks[4:].sum(0) == 1).all()
    assert (marks.sum(1) > 0).all()  # every step is marked somewhere
    for column in range(300):
        first, second = marks[:, column].nonzero().flatten().tolist()
        assert target[column] == values[first, column] + values[second, column]
    assert abs(Adding(9).score(torch.ones(300, 1), target) - Adding.guess) < 0.03


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
    curve = long_memory.train(Run("gru", "bptt", 1, 1e-2), Adding(20), AddingOptions(width=32, steps=400))
    assert curve[0].score > 0.1
    assert curve[-1].score < 0.02


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
        {"rates": "1e-3,nan"},
        {"rates": "inf"},
        {"repeats": 2},
    ],
)
def test_user_errors(wrong):
    with pytest.raises(OptionError, match=r"^[^\n]+$"):
        AddingOptions(**wrong)
