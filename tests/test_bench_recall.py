"""statefeed bench recall: the task, its records, and the need of credit to learn it."""

import json

import pytest
import torch

from statefeed.bench import main, recall
from statefeed.bench.options import OptionError


def test_the_first_symbol_alone_decides():
    symbols = recall.sequences(9, 400, torch.Generator().manual_seed(0))
    assert symbols.shape == (9, 400)
    assert set(symbols[0].tolist()) == set(range(8))
    assert set(symbols[1:].flatten().tolist()) == set(range(8, 16))


def test_smoke(tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    rules = ["dsf", "ramp(0.9)", "fitted"]
    assert main(["recall", "--smoke", f"--rules={','.join(rules)}", f"--output={output}"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["variant"] for r in records] == rules
    for record in records:
        assert (record["bench"], record["delay"], record["steps"], record["seed"]) == ("recall", 2, 4, 1)
        assert record["accuracy"] == record["curve"][-1][1]
        assert record["curve"][-1][0] == 4
        assert {"commit", "machine", "threads", "versions", "command"} <= record.keys()
    assert "ramp(0.9)" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 1000


def test_the_task_is_learned_only_if_credit_passes_the_delay():
    accuracy = {rule: recall.train(rule, 1, 16, 120, "cpu")[-1][1] for rule in ("dsf", "ft-bptt")}
    assert accuracy["dsf"] > 0.9
    assert accuracy["ft-bptt"] < 0.3


def test_learnt_is_the_first_step_with_accuracy_0_9(monkeypatch):
    curves = {"dsf": [(5, 0.2), (10, 0.9), (15, 0.8)], "gate": [(5, 0.2), (10, 0.3), (15, 0.4)]}
    monkeypatch.setattr(recall, "train", lambda rule, *_: curves[rule])
    records = list(recall.run(recall.Options(rules="dsf,gate")))
    assert len(records) == 10
    assert {r["variant"]: (r["accuracy"], r["learnt"]) for r in records} == {"dsf": (0.8, 10), "gate": (0.4, None)}
    assert {r["seed"] for r in records} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("wrong", [{"delay": 0}, {"steps": 0}, {"rules": "fast"}, {"repeats": 4}])
def test_user_errors(wrong):
    with pytest.raises(OptionError, match=r"^[^\n]+$"):
        recall.Options(**wrong)
