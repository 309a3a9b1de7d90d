"""The comparison with pararnn-torch: what it runs and records. The package itself is not installed here."""

import itertools
import json

import pytest
import torch

from statefeed.bench import pararnn


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_task_is_written_as_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pararnn, "RATES", (1e-2,))
    output = tmp_path / "pararnn.jsonl"
    flags = ["--contenders=bptt,dsf newton", "--shapes=5x2x8", "--seeds=1", "--cpu-seconds=0.01"]
    assert pararnn.main([*flags, f"--output={output}"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["task"], r.get("contender")) for r in records] == [
        ("step", None),
        *((task, contender) for task in ("recall", "pydoc") for contender in ("bptt", "dsf newton")),
    ]
    assert records[0]["ms"].keys() == {"bptt", "dsf newton"}
    for record in records[1:]:
        assert record["steps"] == record["curve"][-1][0] >= 1
        assert record["cpu_seconds"] >= 0.01
        assert record["rates"].keys() == {"0.01"}
    assert "records in" in capsys.readouterr().out


def test_a_run_ends_after_its_processor_time_and_learns(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(pararnn.time, "process_time", lambda: next(clock))  # one second a step
    curve = pararnn.train_recall(pararnn.Run("dsf", 1, 1e-2, 150.0))
    assert [(e.step, e.cpu_seconds) for e in curve] == [(15 * k, 15 * k) for k in range(1, 11)]
    assert curve[0].score < 0.2
    assert curve[-1].score > 0.9


@pytest.mark.parametrize(
    "flags",
    [["--tasks=mnist"], ["--contenders=gru"], ["--repeats=1"], ["--shapes=5x5"], ["--seeds=0"], ["--cpu-seconds=0"]],
)
def test_invalid_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as error:
        pararnn.main(flags)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_without_the_package(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        pararnn.main([])
    assert error.value.code == 2
    assert "paragru needs the package pararnn-torch" in capsys.readouterr().err
