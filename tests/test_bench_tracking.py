"""statefeed bench tracking: the task, its records, the choice of the rate, and which models can learn it."""

import json

import pytest
import torch

from statefeed.bench import main, tracking
from statefeed.bench.options import OptionError
from statefeed.bench.tracking import Evaluation, Run


def codes(bits):
    return [int("".join(map(str, string)), 2) for string in bits.T.tolist()]


def test_every_string_is_in_one_set_and_half_of_the_parities_are_1():
    data = tracking.strings(6, 3)
    assert sorted(code for part in data[:3] for code in codes(part)) == list(range(2**6))
    assert [part.shape for part in data] == [(6, 48), (6, 8), (6, 8), (12, 1024)]
    for part in data[1:]:
        assert part.sum(0).remainder(2).float().mean() == 0.5


def test_the_accuracy_is_the_fraction_of_parities():
    data = tracking.strings(6, 3)

    def parity(bits):
        odd = torch.zeros(bits.shape[1], dtype=torch.int64)
        for row in bits:
            odd ^= row
        return torch.nn.functional.one_hot(odd, 2)

    assert all(tracking.accuracy(parity, part) == 1 for part in data)
    assert all(tracking.accuracy(lambda bits: parity(bits).flip(1), part) == 0 for part in data)
    assert all(tracking.accuracy(lambda bits: parity(bits[1:]), part) == 0.5 for part in data)  # misses the first bit


def test_smoke(tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    assert main(["tracking", "--smoke", "--cells=gru,s4d,mingru", "--rules=dsf,gate+1", f"--output={output}"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    cases = [("gru", "dsf"), ("gru", "gate+1"), ("s4d", "bptt"), ("mingru", "bptt")]
    assert [(r["cell"], r["variant"]) for r in records] == cases
    for record in records:
        assert (record["bench"], record["T"], record["H"], record["steps"], record["seed"]) == ("tracking", 4, 8, 4, 1)
        assert record["curve"][-1] == [4, record["accuracy"], record["accuracy_twice"]]
        assert str(record["lr"]) in record["rates"]
        assert {"commit", "machine", "threads", "versions", "command"} <= record.keys()
    assert "gate+1" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 1000


def test_a_gru_learns_short_strings_and_is_right_at_twice_their_length_but_a_linear_scan_is_not():
    options = tracking.Options(length=5, width=32, steps=700)
    gru, mingru = (tracking.train(Run(cell, "bptt", 1, 1e-2), options)[-1] for cell in ("gru", "mingru"))
    assert gru.long > 0.95
    assert mingru.long < 0.7


def test_the_rate_is_chosen_on_validation_strings_with_a_seed_of_its_own(monkeypatch):
    seen = []

    def train(run, options):
        seen.append(run)
        learns = run.rate == 3e-3
        # The held-out accuracies prefer another rate.
        return [Evaluation(1, 0.5, 1.0 - learns, 1.0 - learns), Evaluation(2, 0.5 + 0.4 * learns, 0.95, 0.9)]

    monkeypatch.setattr(tracking, "train", train)
    records = list(tracking.run(tracking.Options(cells="gru", rules="dsf")))
    assert {run.seed for run in seen[:3]} == {0}
    assert [(r["seed"], r["lr"]) for r in records] == [(1, 3e-3), (2, 3e-3), (3, 3e-3)]
    assert {r["learnt"] for r in records} == {2}
    assert {(r["accuracy"], r["accuracy_twice"]) for r in records} == {(0.95, 0.9)}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"length": 3}, "length must be 4 to 20, got 3"),
        ({"length": 21}, "length must be 4 to 20, got 21"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"rules": "fast"}, "feedback must be"),
        ({"cells": "gru,tcn"}, "cells must be among"),
        ({"cells": "rnn", "rules": "gate"}, "it has no gate"),
        ({"repeats": 2}, "repeats must be at least 3"),
    ],
)
def test_user_errors(wrong, sentence):
    with pytest.raises(OptionError, match=sentence) as error:
        tracking.Options(**wrong)
    assert "\n" not in str(error.value)
