"""The benchmark of custom cells: what it runs and records, and that it does not time a wrong cell."""

import json

import pytest
import torch

from statefeed.bench import custom, custom_cells


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_case_is_written_as_a_record(tmp_path, capsys):
    output = tmp_path / "custom.jsonl"
    flags = ["--forms=whole,split", "--shapes=5x2x8", "--repeats=5", f"--output={output}"]
    assert custom.main(flags) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["cell"], r["pass"]) for r in records] == [
        (cell, work) for cell in custom_cells.CELLS for work in ("training", "forward")
    ]
    training = {"whole bptt", "whole dsf", "split bptt", "split dsf"}
    for record in records:
        assert record["times_faster"].keys() == (training if record["pass"] == "training" else {"whole", "split"})
        assert record["threads"] == 1
        assert record["command"].startswith("python -m statefeed.bench.custom --forms=whole,split")
    assert "times the loop's speed" in capsys.readouterr().out


def test_a_compiled_step_is_run_and_its_first_call_is_recorded(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    case = custom.Case("light-gru", "training", custom.Shape(5, 2, 8))
    record = custom.measure(case, 5, ["compiled"], ["bptt", "dsf"])
    assert len(compiled) == 2
    assert record["first_call_s"].keys() == {"compiled bptt", "compiled dsf"}


def test_a_split_that_is_not_the_cell_is_not_timed(tmp_path, monkeypatch, capsys):
    class Wrong(custom_cells.SplitLightGRUCell):
        def project_input(self, x):
            return 1.01 * self.input(x)

    monkeypatch.setitem(custom_cells.CELLS, "light-gru", custom_cells.Forms(custom_cells.LightGRUCell, Wrong))
    output = tmp_path / "custom.jsonl"
    flags = ["--cells=light-gru", "--forms=split", "--shapes=5x2x8", "--repeats=5", f"--output={output}"]
    assert custom.main(flags) == 1
    assert "light-gru split bptt must agree with the loop" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    "flags", [["--cells=mgu"], ["--repeats=1"], ["--shapes=5x5"], ["--forms=half"], ["--rules=gate"], ["--threads=0"]]
)
def test_invalid_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as error:
        custom.main(flags)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
