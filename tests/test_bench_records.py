"""The records of a benchmark: written one by one, and those of an earlier run are kept until the first one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from statefeed.bench import custom, main, pararnn, paths, scan
from statefeed.bench.records import written

SMALL = {
    paths: ["--cells=gru", "--dtypes=float32", "--passes=training", "--shapes=5x2x8"],
    custom: ["--cells=light-gru", "--forms=split", "--shapes=5x2x8"],
    pararnn: ["--tasks=step", "--contenders=bptt", "--shapes=5x2x8"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_record_is_in_the_file_when_it_is_returned(tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    output.write_text("earlier\n")
    for count, record in enumerate(written(({"n": n} for n in range(3)), output), 1):
        assert [json.loads(line) for line in output.read_text().splitlines()] == [{"n": n} for n in range(count)]
        assert record == {"n": count - 1}


@pytest.mark.parametrize("bench", SMALL, ids=lambda bench: bench.__name__.rpartition(".")[2])
def test_records_are_kept_if_the_first_measurement_fails(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "records.jsonl"
    output.write_text("earlier\n")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "interleaved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*SMALL[bench], "--repeats=5", f"--output={output}"])
    assert output.read_text() == "earlier\n"


def test_statefeed_bench_keeps_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "records.jsonl"
    output.write_text("earlier\n")

    def interrupted(_: object) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(scan, "run", interrupted)
    assert main(["scan", "--smoke", f"--output={output}"]) == 130
    assert output.read_text() == "earlier\n"


@pytest.mark.parametrize("bench", SMALL, ids=lambda bench: bench.__name__.rpartition(".")[2])
def test_a_missing_folder_is_named_before_anything_is_measured(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main([*SMALL[bench], "--repeats=5", "--output=no/such/folder.jsonl"])
    assert error.value.code == 2
    assert "output must be in an existing folder, got 'no/such/folder.jsonl'" in capsys.readouterr().err


def test_a_second_run_reports_that_it_replaces_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["scan", "--smoke", f"--output={tmp_path / 'scan.jsonl'}"]
    printed = []
    for _ in range(2):
        assert main(flags) == 0
        printed.append("the first record replaces those in" in capsys.readouterr().err)
    assert printed == [False, True]


def test_an_output_that_is_a_folder_raises_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("records.jsonl", "records.png"):
        (tmp_path / name).mkdir()
        assert main(["scan", "--smoke", f"--output={tmp_path / 'records.jsonl'}"]) == 2
        assert f"but {str(tmp_path / name)!r} is a folder" in capsys.readouterr().err
        (tmp_path / name).rmdir()
