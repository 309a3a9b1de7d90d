"""`statefeed train --again`, which `make train` runs: where it trains, and what a finished run says next."""

import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from conftest import metrics

from statefeed.lm import cli
from statefeed.lm import recipe as recipes
from statefeed.lm.config import Train
from statefeed.lm.errors import UsageError
from statefeed.lm.run import curves, next_steps
from statefeed.lm.run import train as training


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which Ctrl-C is pressed."""
    seed_step, steps = training.seed_step, list[int]()

    def interrupted(recipe: Train, step: int, columns: int, rank: int) -> torch.Tensor:
        if step in steps:
            steps.remove(step)
            os.kill(os.getpid(), signal.SIGINT)
        return seed_step(recipe, step, columns, rank)

    monkeypatch.setattr(training, "seed_step", interrupted)
    return steps


def test_it_resumes_what_was_interrupted_and_numbers_what_comes_after(
    flags: list[str], tmp_path: Path, interrupt: list[int], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *flags, "--again", f"--run.dir={tmp_path / 'a'}"]
    interrupt.append(6)
    assert cli.main(words) == 130
    capsys.readouterr()
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"resuming the unfinished run in {tmp_path / 'a'}\n")
    assert "resuming after step 6" in out
    assert metrics(tmp_path / "a") == metrics(run)

    interrupt.append(3)
    assert cli.main(words) == 130
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'a'} holds a run that has ended or is of another recipe: this one is in ")
    assert f"this one is in {tmp_path / 'a-2'}\n" in out
    assert cli.main(words) == 0
    assert "resuming after step 3" in capsys.readouterr().out
    assert metrics(tmp_path / "a-2") == metrics(run)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a-2"}


def test_an_unfinished_run_of_another_recipe_is_kept(
    flags: list[str], tmp_path: Path, interrupt: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *flags, "--again", f"--run.dir={tmp_path / 'a'}"]
    interrupt.append(6)
    assert cli.main(words) == 130
    before = metrics(tmp_path / "a")
    assert cli.main([*words, "--train.lr=1e-3"]) == 0
    assert metrics(tmp_path / "a") == before
    assert (tmp_path / "a-2" / "weights.safetensors").is_file()
    capsys.readouterr()
    assert cli.main([*words, "--resume"]) == 2
    assert "--resume and --again exclude each other" in capsys.readouterr().err


def test_a_brief_run_ends_without_a_sample_and_commands(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *flags, "--brief", f"--run.dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "a sample" not in out
    assert "next:" not in out
    assert "brief:" not in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_ends_with_commands_that_work_and_its_picture(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn, draw = [], curves.draw

    def counted(rows: dict[str, list[tuple[int, float]]], path: Path, place: str) -> None:
        drawn.append((len(rows["valid"]), len(rows["test"])))
        draw(rows, path, place)

    monkeypatch.setattr(curves, "draw", counted)
    assert cli.main(["train", *flags, "--run.dir=a run"]) == 0
    assert drawn == [(1, 0), (2, 0), (3, 0), (3, 1)]  # at every evaluation, and with the score of the test split
    *_, picture, following, first, second, third = capsys.readouterr().out.splitlines()
    assert (picture, following) == ("learning curves: a run/curves.png", "next:")
    assert third == "  statefeed compare 'a run/config.yaml' --feedback=bptt,dsf"
    for line in (first, second):
        program, *words = shlex.split(line)
        assert program == "statefeed"
        assert cli.main(words) == 0


def test_a_program_that_is_not_on_the_path_is_called_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = [None, "/usr/bin/statefeed"]
    monkeypatch.setattr("shutil.which", lambda name: found[0])
    monkeypatch.setattr("sys.argv", [".venv/bin/statefeed", "train"])
    assert next_steps.program() == ".venv/bin/statefeed"
    monkeypatch.setattr("sys.argv", ["/somewhere/statefeed/__main__.py", "train"])
    monkeypatch.setattr("sys.executable", "/usr/bin/python3")
    assert next_steps.program() == "/usr/bin/python3 -m statefeed"
    found.reverse()
    monkeypatch.setattr("sys.argv", ["/usr/bin/statefeed", "train"])
    assert next_steps.program() == "statefeed"


@pytest.mark.parametrize("here", [".", "..", "./"])
def test_a_folder_without_a_name_of_its_own(
    here: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / ("b" if here == ".." else ""))
    for _ in range(3):
        assert cli.main(["train", *flags, "--again", "--brief", "--train.steps=1", f"--run.dir={here}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a-2", "a-3"}


def test_there_is_no_folder_beside_the_root() -> None:
    with pytest.raises(UsageError, match=r"there is no folder beside /: run\.dir must name another folder"):
        recipes.beside("/", "-2")
