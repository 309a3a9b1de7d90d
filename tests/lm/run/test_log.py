"""What a run prints: a bar on a terminal, plain lines elsewhere, rows that are on disk at once."""

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from statefeed.lm import cli
from statefeed.lm.config import UsageError
from statefeed.lm.errors import Diverged
from statefeed.lm.run.evaluate import Score
from statefeed.lm.run.log import TRAIN_ROWS, Log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(stream: io.StringIO, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Log(path, steps=4) as log:
        log.print("[opening] line")
        for step in range(1, 5):
            log.step(step, 1, loss=2.5, tokens=100)
        log.score(4, 1, "valid", Score(loss=2.0, tokens=50, tokens_per_byte=0.5, seconds=0.1))
    return stream.getvalue()


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = written(Terminal(), tmp_path / "m.jsonl", monkeypatch)
    assert "\x1b[" in out
    assert re.search(r"4/4 steps  loss 2\.500  [\d,]+ tokens/s  0:00:00 left", re.sub(r"\x1b\[[\d?]*\w", "", out))


def test_the_bar_says_nothing_of_a_loss_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = re.sub(r"\x1b\[[\d?]*\w", "", written(Terminal(), tmp_path / "m.jsonl", monkeypatch))
    assert "0/4 steps" in out
    assert "nan" not in out


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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux can reset its count")
def test_the_peak_of_memory_is_that_since_the_log_was_entered(tmp_path: Path) -> None:
    much = 1 << 28
    torch.zeros(much, dtype=torch.uint8).fill_(1)
    with Log(tmp_path / "m.jsonl", steps=2) as log:
        for step in (1, 2):
            torch.zeros(much * (step - 1), dtype=torch.uint8).fill_(1)
            log.step(step, 1, loss=1.0, tokens=1)
    peaks = [json.loads(line)["peak_bytes"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert peaks[1] - peaks[0] == pytest.approx(much, rel=0.1)


def test_metrics_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("precious")
    with pytest.raises(FileExistsError):
        Log(tmp_path / "m.jsonl", steps=1)
    assert (tmp_path / "m.jsonl").read_text() == "precious"


def test_the_time_of_scores_is_not_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("statefeed.lm.run.log.time.perf_counter", lambda: clock[0])

    def wait(log: Log, seconds: float, phase: str | None) -> None:
        clock[0] += seconds
        log.time_phase(phase)

    with Log(tmp_path / "m.jsonl", steps=2) as log:
        for step in (1, 2):
            for phase, seconds in (("data", 1.0), ("forward", 2.0), ("backward", 3.0), ("optimizer", 4.0)):
                wait(log, seconds, phase)
            log.step(step, 1, loss=1.0, tokens=50)
            log.score(step, 1, "valid", Score(loss=1.0, tokens=10, tokens_per_byte=1.0, seconds=100.0))
            wait(log, 100.0, None)
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    assert [row["tokens_per_s"] for row in train] == [5.0, 5.0]
    assert [row["backward_ms"] for row in train] == [3000.0, 3000.0]


def test_it_resumes_after_the_last_record(tmp_path: Path) -> None:
    """Rows after the checkpoint are dropped, the steps since the last row remembered."""
    with Log(tmp_path / "whole.jsonl", steps=3 * TRAIN_ROWS) as whole:
        for step in range(1, 7):
            whole.step(step, 1, step / 7, tokens=1)
    with Log(tmp_path / "m.jsonl", steps=3 * TRAIN_ROWS) as log:
        for step in range(1, 5):
            log.step(step, 1, step / 7, tokens=1)
        memory = json.loads(json.dumps(log.state_dict(4)))
        for step in (5, 6):
            log.step(step, 1, 99.0, tokens=1)
    with Log(tmp_path / "m.jsonl", 3 * TRAIN_ROWS, memory) as log:
        for step in (5, 6):
            log.step(step, 1, step / 7, tokens=1)
    assert metrics_of(tmp_path / "m.jsonl") == metrics_of(tmp_path / "whole.jsonl")
    memory["bytes"] = 1 << 20
    with pytest.raises(UsageError, match="shorter than when the checkpoint was made"):
        Log(tmp_path / "m.jsonl", 3 * TRAIN_ROWS, memory)


def metrics_of(path: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in map(json.loads, path.read_text().splitlines())]


def test_no_row_and_no_state_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with Log(tmp_path / "m.jsonl", steps=3 * TRAIN_ROWS) as log:
        log.step(1, 1, torch.tensor(2.0), tokens=1)
        log.step(2, 1, torch.tensor(math.nan), tokens=1)
        with pytest.raises(Diverged, match="loss nan at step 2"):
            log.state_dict(2)
        with pytest.raises(Diverged, match="loss nan at step 2"):
            log.step(3, 1, torch.tensor(2.0), tokens=1)
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_only_rank_zero_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Log(None, steps=1) as log:
        log.print("words")
        log.step(1, 1, 1.0, tokens=1)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_missing_tensorboard_raises_a_clear_error(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["train", *flags, "--run.tensorboard=true", f"--run.dir={tmp_path / 'run'}"]) == 2
    sentence = 'statefeed: run.tensorboard needs TensorBoard: pip install "statefeed[tensorboard]"\n'
    assert capsys.readouterr().err == sentence
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, 0.0, purge_step))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            written.append((key, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    monkeypatch.setattr("statefeed.lm.run.tensorboard.writer_class", lambda: Writer)
    with Log(tmp_path / "m.jsonl", 1, None, tmp_path / "board") as log:
        log.step(1, 1, 2.0, tokens=1)
    assert written[0] == (str(tmp_path / "board"), 0.0, 1)
    assert ("train/loss", 2.0, 1) in written
    assert written[-1][0] == "closed"
