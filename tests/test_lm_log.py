"""What a run tells: a bar on a terminal, plain lines elsewhere, rows that are on disk at once."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from statefeed.lm.evaluate import Score
from statefeed.lm.log import TRAIN_ROWS, Log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(stream: io.StringIO, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Log(path, steps=4) as log:
        log.say("[opening] line")
        for step in range(1, 5):
            log.step(step, 1, loss=2.5, tokens=100)
        log.score(4, 1, "valid", Score(loss=2.0, tokens=50, tokens_per_byte=0.5, seconds=0.1))
    return stream.getvalue()


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = written(Terminal(), tmp_path / "m.jsonl", monkeypatch)
    assert "\x1b[" in out
    assert re.search(r"4/4 steps  loss 2\.500  [\d,]+ tokens/s  0:00:00 left", re.sub(r"\x1b\[[\d?]*\w", "", out))


def test_anything_else_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = written(io.StringIO(), tmp_path / "m.jsonl", monkeypatch)
    assert "\x1b" not in out
    opening, line = out.splitlines()
    assert opening == "[opening] line"
    assert line.startswith("step 4 of 4: train loss 2.500, valid loss 2.000, perplexity 7.39, 1.443 bits per byte, ")


def test_rows_are_on_disk_at_once_and_few(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    steps = 10 * TRAIN_ROWS
    with Log(path, steps) as log:
        for step in range(1, 21):
            log.step(step, 1, loss=float(step), tokens=1)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 5.5), (20, 15.5)]


def test_metrics_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("precious")
    with pytest.raises(FileExistsError):
        Log(tmp_path / "m.jsonl", steps=1)
    assert (tmp_path / "m.jsonl").read_text() == "precious"


def test_the_time_of_scores_is_not_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 10.0, 110.0, 110.0, 120.0, 120.0])
    monkeypatch.setattr("statefeed.lm.log.time.perf_counter", lambda: next(clock))
    path = tmp_path / "m.jsonl"
    with Log(path, steps=2) as log:
        log.step(1, 1, loss=1.0, tokens=50)
        log.score(1, 1, "valid", Score(loss=1.0, tokens=10, tokens_per_byte=1.0, seconds=100.0))
        log.step(2, 1, loss=1.0, tokens=50)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["tokens_per_s"] for row in rows if row["split"] == "train"] == [5.0, 5.0]
