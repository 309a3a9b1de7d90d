"""statefeed bench forward: iterations of random and trained layers, and the parity check."""

import json
import math

import pytest
import torch

import statefeed as sf
from statefeed.bench import forward, main
from statefeed.bench.options import OptionError
from statefeed.cells import CELLS


def bench(tmp_path, *flags):
    output = tmp_path / "records.jsonl"
    code = main(["forward", *flags, f"--output={output}"])
    return code, [json.loads(line) for line in output.read_text().splitlines()]


def test_records(tmp_path):
    flags = ["--steps=32,64", "--widths=8", "--batches=2", "--tolerances=1e-2,1e-5", "--scales=1,3", "--cells=gru,lstm"]
    code, records = bench(tmp_path, *flags)
    assert code == 0
    assert len(records) == 2 * 2 * 2 * 2
    assert (tmp_path / "records.png").exists()
    for loose, tight in zip(records[::2], records[1::2], strict=True):
        assert (loose["method"], tight["method"]) == ("newton(0.01)", "newton(1e-05)")
        assert (loose["T"], loose["B"], loose["H"]) in {(32, 2, 8), (64, 2, 8)}
        assert 1 < loose["iterations"] < tight["iterations"] <= loose["T"]
        assert loose["sequential_steps"] == tight["sequential_steps"] == 0
        assert tight["error"] < 1e-4 < 10 * loose["error"] < 1
        assert "ms" not in loose
    iterations = {
        (r["variant"], r["T"]): r["iterations"] for r in records if r["cell"] == "gru" and "05" in r["method"]
    }
    assert iterations["random x3", 64] > iterations["random x1", 64]


def test_times(tmp_path):
    code, records = bench(tmp_path, "--smoke", "--timed", "--cells=rnn", "--tolerances=1e-3")
    assert code == 0
    (record,) = records
    for name in ("ms", "sequential_ms", "speedup"):
        assert 0 < record[name]["min"] <= record[name]["median"] <= record[name]["max"] < math.inf


def test_layers_of_a_trained_model(tmp_path, run):
    code, records = bench(tmp_path, "--smoke", "--cells=none", "--tolerances=1e-6", f"--runs={run}")
    assert code == 0
    model = forward.folder.load(run).model
    assert [r["layer"] for r in records] == list(range(len(model.blocks)))
    assert all(r["error"] < 1e-4 for r in records)
    subjects = forward.trained_subjects(run, 8, 2, "cpu")
    assert torch.equal(subjects[0].module.weight_hh_l0, model.blocks[0].rnn.weight_hh_l0)
    assert subjects[0].x.shape[:2] == (8, 2)
    assert forward.trained_subjects(run, 10**9, 1, "cpu") == []


def test_wrong_states_are_not_measured(tmp_path, monkeypatch, capsys):
    right = CELLS["gru"].newton_update

    def wrong(gates, *rest):
        gates[1] += 1e-6
        return right(gates, *rest)

    monkeypatch.setattr(CELLS["gru"], "newton_update", wrong, raising=False)
    assert main(["forward", "--smoke", "--cells=gru", f"--output={tmp_path / 'records.jsonl'}"]) == 1
    assert "must agree with the sequential states" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"tolerances": "0"}, {"tolerances": "x"}, {"max_iterations": 0}, {"runs": "nowhere"}, {"dtype": "int8"}]
)
def test_invalid_options(options):
    with pytest.raises(OptionError):
        forward.Options(**options)


def test_a_folder_without_a_model(tmp_path, capsys):
    code = main(["forward", "--smoke", f"--runs={tmp_path}", f"--output={tmp_path / 'records.jsonl'}"])
    assert code == 2
    assert "not a run folder" in capsys.readouterr().err


def test_the_rival_is_torchs_layer():
    subject = next(forward.random_subjects(forward.Options(), 8, 1, [4]))
    assert type(forward.torch_layer(subject)) is torch.nn.RNN
    assert isinstance(subject.module, sf.RNN)
