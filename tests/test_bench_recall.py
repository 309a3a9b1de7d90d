"""statefeed bench recall: the task, and the need of credit to learn it."""

import json

import torch

from statefeed.bench import long_memory, main, recall
from statefeed.bench.long_memory import Run
from statefeed.bench.long_memory_options import RecallOptions
from statefeed.bench.recall import Recall


def test_the_first_symbol_alone_decides():
    symbols = recall.sequences(9, 400, torch.Generator().manual_seed(0))
    assert symbols.shape == (9, 400)
    assert set(symbols[0].tolist()) == set(range(8))
    assert set(symbols[1:].flatten().tolist()) == set(range(8, 16))
    x, target = Recall(9).draw(400, torch.Generator().manual_seed(0))
    assert x.shape == (9, 400, 16)
    assert (x.sum(-1) == 1).all()
    assert torch.equal(x.argmax(-1), symbols)
    assert torch.equal(target, symbols[0])


def test_smoke(tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    rules = ["dsf", "ramp(0.9)", "fitted"]
    assert main(["recall", "--smoke", "--cells=gru", f"--rules={','.join(rules)}", f"--output={output}"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["variant"] for r in records] == rules
    for record in records:
        assert (record["bench"], record["T"], record["H"], record["steps"], record["seed"]) == ("recall", 6, 8, 4, 1)
        assert record["curve"][-1][:2] == [4, record["accuracy"]]
    assert "ramp(0.9)" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 1000


def test_the_task_is_learned_only_if_credit_passes_all_steps():
    options = RecallOptions(steps=120)
    scores = {rule: long_memory.train(Run("gru", rule, 1, 1e-2), Recall(17), options) for rule in ("dsf", "ft-bptt")}
    assert scores["dsf"][-1].score > 0.9
    assert scores["ft-bptt"][-1].score < 0.3
