"""statefeed bench tracking: the task, its records, the choice of the rate, and which models can learn it."""

import json

import pytest
import torch

from statefeed.bench import main, tracking
from statefeed.bench.options import OptionError
from statefeed.bench.tracking import Evaluation, Run


def odd(bits):
    """The parity of the bits so far, without a sum."""
    rows, before = [], torch.zeros_like(bits[0])
    for row in bits:
        before = before ^ row
        rows.append(before)
    return torch.stack(rows)


def test_half_of_the_parities_are_1_and_no_two_sets_are_equal():
    data = tracking.strings(6, torch.Generator().manual_seed(3))
    assert [part.shape for part in data] == [(6, 512), (6, 512), (12, 512)]
    assert set(data.long.flatten().tolist()) == {0, 1}
    for part in data:
        assert (odd(part).float().mean(1) == 0.5).all()
    assert not torch.equal(data.valid, data.held_out)


def test_the_accuracy_is_that_of_the_last_parity():
    data = tracking.strings(6, torch.Generator().manual_seed(3))

    def exact(bits):
        return torch.nn.functional.one_hot(odd(bits), 2)

    def only_at_the_end(bits):
        return torch.cat([exact(bits)[:-1].flip(-1), exact(bits)[-1:]])

    for part in data:
        assert torch.equal(tracking.parity(part), odd(part))
        assert tracking.accuracy(exact, part) == tracking.accuracy(only_at_the_end, part) == 1
        assert tracking.accuracy(lambda bits: exact(bits).flip(-1), part) == 0
        assert tracking.accuracy(lambda bits: exact(bits[1:]), part) == 0.5  # misses the first bit


def test_smoke(tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    assert main(["tracking", "--smoke", "--cells=gru,s4d,mingru", "--rules=dsf,gate+1", f"--output={output}"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    cases = [("gru", "dsf"), ("gru", "gate+1"), ("s4d", "bptt"), ("mingru", "bptt")]
    assert [(r["cell"], r["variant"]) for r in records] == cases
    for record in records:
        assert (record["bench"], record["seed"]) == ("tracking", 1)
        assert [record[key] for key in ("T", "every", "H", "steps")] == [4, 2, 8, 4]
        assert record["curve"][-1] == [4, record["accuracy"], record["accuracy_twice"]]
        assert str(record["lr"]) in record["rates"]
        assert {"commit", "machine", "threads", "versions", "command"} <= record.keys()
    assert "gate+1" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 1000


def test_a_gru_learns_the_parity_and_is_right_at_twice_the_length_but_a_linear_scan_is_not():
    options = tracking.Options(length=8, every=4, width=32, steps=500)
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
    assert {run.seed for run in seen[:2]} == {0}
    assert [(r["seed"], r["lr"]) for r in records] == [(1, 3e-3), (2, 3e-3), (3, 3e-3)]
    assert {r["learnt"] for r in records} == {2}
    assert {(r["accuracy"], r["accuracy_twice"]) for r in records} == {(0.95, 0.9)}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"every": 4}, "length must be a multiple of every, 4, got 30"),
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
