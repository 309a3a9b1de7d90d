"""statefeed report: what cannot be read is left out and named, and what is read is not overwritten."""

import json
import shutil
from pathlib import Path

import pytest

from statefeed.lm import cli


@pytest.fixture
def runs(run: Path, tmp_path: Path) -> Path:
    """A folder with a run and with one whose record is broken."""
    shutil.copytree(run, tmp_path / "runs" / "good")
    shutil.copytree(run, tmp_path / "runs" / "bad")
    (tmp_path / "runs" / "bad" / "record.json").write_text("{")
    return tmp_path / "runs"


@pytest.mark.parametrize("paths", [["."], ["good", "bad"], ["bad", "good"]])
def test_an_unreadable_run_is_left_out_with_a_notice(
    paths: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    capsys.readouterr()
    assert cli.main(["report", *(str(runs / path) for path in paths), "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}: 1 runs, 0 records of benchmarks\n"
    assert err.startswith(f"statefeed: left out: {runs / 'bad' / 'record.json'} cannot be read: ")
    assert err.count("\n") == 1


def test_a_file_with_an_error_is_left_out_completely(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    line = json.dumps({"bench": "layers", "ms": spread})
    (tmp_path / "records.jsonl").write_text(f"{line}\n{{\n")
    capsys.readouterr()
    output = str(tmp_path / "page.html")
    assert cli.main(["report", str(tmp_path / "records.jsonl"), str(runs / "good"), "-o", output]) == 0
    out, err = capsys.readouterr()
    assert ": 1 runs, 0 records of benchmarks" in out
    assert f"left out: line 2 of {tmp_path / 'records.jsonl'} is no record" in err


@pytest.mark.parametrize("flag", ["-o", "--markdown", "--summary"])
@pytest.mark.parametrize("name", ["good/metrics.jsonl", "good/config.yaml", "records"])
def test_input_files_are_not_overwritten(flag: str, name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "records").write_text("{}\n")
    before = (runs / name).read_bytes()
    assert cli.main(["report", str(runs / "good"), str(runs / "records"), flag, str(runs / name)]) == 2
    assert "the page must not replace an input file" in capsys.readouterr().err
    assert (runs / name).read_bytes() == before


def test_records_of_other_peoples_packages_are_not_reported(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "machine.jsonl").write_text('{"package": "darts", "model": "GRU"}\n')
    assert cli.main(["report", str(runs), "-o", str(runs / "page.html")]) == 0
    assert "machine.jsonl" not in capsys.readouterr().err


def test_a_run_of_a_rule_that_does_not_exist_is_left_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "good", runs / "unknown")
    config = runs / "unknown" / "config.yaml"
    config.write_text(config.read_text().replace("feedback: bptt", "feedback: nope"))
    capsys.readouterr()
    assert cli.main(["report", str(runs), "-o", str(runs / "page.html")]) == 0
    out, err = capsys.readouterr()
    assert ": 1 runs, " in out
    assert f"left out: {config} cannot be read: feedback must be " in err


def test_two_kinds_of_pages_are_an_error(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [f"--markdown={tmp_path / 'a.md'}", f"--verdicts={tmp_path / 'b.md'}"]
    assert cli.main(["report", str(runs / "good"), *pages]) == 2
    assert "only one of --markdown, --summary and --verdicts" in capsys.readouterr().err
    assert not (tmp_path / "a.md").exists()
