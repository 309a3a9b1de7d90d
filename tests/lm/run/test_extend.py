"""A run that is resumed for longer, or whose text has moved."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics

from statefeed.lm import cli
from statefeed.lm import recipe as recipes
from statefeed.lm.compare.run_result import read_run
from statefeed.lm.config import Train
from statefeed.lm.run import train as training
from statefeed.lm.run.learning_rate import learning_rate


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A run of 12 steps that has ended."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_finished_run_is_extended(copied: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(copied), "--train.steps=20"]) == 0
    out = capsys.readouterr().out
    config = recipes.load(copied / "config.yaml")
    rate = learning_rate(config.train, 13, 20, 0)
    assert "extended from 12 to 20 steps: " in out
    assert f"so that step 13 has learning rate {rate:.3g}" in out
    assert config.train.steps == 20
    assert json.loads((copied / "record.json").read_text())["extended"] == [{"step": 12, "from": 12, "to": 20}]
    found = metrics(copied)
    assert [row["step"] for row in found if row["split"] == "train"] == list(range(1, 21))
    assert found[:15] == metrics(run)[:15]  # all but the score on the test split
    assert [row["step"] for row in found if row["split"] == "test"] == [
        min((row["loss"], row["step"]) for row in found if row["split"] == "valid")[1]
    ]
    assert read_run(copied).outcome == "finished"
    before = metrics(copied)
    assert cli.main(["train", "--resume", str(copied)]) == 0
    assert metrics(copied) == before


def test_an_extended_run_uses_the_schedule_of_all_its_steps(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rate(recipe: object, step: int, steps: int, epoch: int) -> float:
        asked.append((step, steps))
        return learning_rate(recipe, step, steps, epoch)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "learning_rate", rate)
    assert cli.main(["train", "--resume", str(copied), "--train.steps=15"]) == 0
    assert asked[-3:] == [(13, 15), (14, 15), (15, 15)]


def test_a_run_of_epochs_is_extended(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [*flags, "--train.steps=null", "--train.context=256", "--train.epochs=1"]
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 0
    steps = json.loads((folder / "record.json").read_text())["steps_per_epoch"]
    assert cli.main(["train", "--resume", str(folder), "--train.epochs=2"]) == 0
    assert max(row["step"] for row in metrics(folder)) == 2 * steps
    assert cli.main(["train", "--resume", str(folder), f"--train.steps={2 * steps + 1}"]) == 0
    assert max(row["step"] for row in metrics(folder)) == 2 * steps + 1


@pytest.mark.parametrize("rules", ["calibrated+1@0.5/bptt", "bptt@0.9/calibrated+1"])
def test_a_run_whose_rules_change_is_extended(rules: str, flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli.main(["train", *flags, f"--model.feedback={rules}", f"--run.dir={folder}"]) == 0
    assert cli.main(["train", "--resume", str(folder), "--train.steps=30"]) == 0
    assert max(row["step"] for row in metrics(folder)) == 30


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--train.steps=7"], "train.steps is 12 there, got 7: it can be extended beyond its 12 steps only"),
        (["--train.epochs=9"], "train.epochs has no effect while train.steps is 12"),
        (["--train.steps=20", "--train.lr=1"], "train.lr is 0.003 there, got 1.0"),
    ],
)
def test_a_change_that_is_not_an_extension_raises(
    arguments: list[str], sentence: str, copied: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(copied), *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert (copied / "config.yaml").read_text() == (run / "config.yaml").read_text()
    assert metrics(copied) == metrics(run)


@pytest.fixture
def moved(flags: list[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose text, named by a relative path, has been moved to moved.txt."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copy(text, "story.txt")
    words = [flag for flag in flags if "path" not in flag]
    assert cli.main(["train", *words, "--data.path=story.txt", f"--run.dir={tmp_path / 'run'}"]) == 0
    return tmp_path / "run"


def test_a_relative_path_means_the_same_in_every_folder(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.load(moved / "config.yaml").data.path == str(tmp_path / "here" / "story.txt")
    assert cli.main(["evaluate", str(moved)]) == 0
    assert cli.main(["train", "--resume", str(moved)]) == 0


def test_a_text_that_has_moved_is_named(
    moved: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = Path("story.txt").rename(tmp_path / "moved.txt")
    capsys.readouterr()
    for command in (["evaluate", str(moved)], ["train", "--resume", str(moved)]):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert "there is no file or folder" in err
        assert "name the text with --data.path" in err
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", str(moved), "--data.path=moved.txt"]) == 0
    assert capsys.readouterr().out.startswith("valid: loss ")
    assert cli.main(["train", "--resume", str(moved), "--data.path=moved.txt"]) == 0
    assert recipes.load(moved / "config.yaml").data.path == str(new)
    assert metrics(moved) == metrics(run)


def test_another_text_is_scored_and_named(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[:2000])
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), f"--data.path={other}"]) == 0
    assert capsys.readouterr().out.startswith("valid of other.txt, another text than the run's: loss ")
    assert cli.main(["evaluate", str(run), f"--data.path={other}", "--split=all"]) == 0
    assert capsys.readouterr().out.startswith("all of other.txt, another text than the run's: loss ")
    other.write_text("§" * 2000)
    assert cli.main(["evaluate", str(run), f"--data.path={other}"]) == 2
    assert "the text contains the character '§'" in capsys.readouterr().err


def test_a_diverged_run_that_is_resumed_has_not_ended(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--train.optimizer=sgd", "--train.clip=null", "--train.lr=1e6", "--train.warmup=0.5"]
    folder = tmp_path / "run"
    assert cli.main(["train", *flags, *words, f"--run.dir={folder}"]) == 1
    assert read_run(folder).outcome == "diverged"

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    # Longer, its rate rises more slowly.
    monkeypatch.setattr(training, "optimize", interrupted)
    assert cli.main(["train", "--resume", str(folder), "--train.steps=10000000"]) == 130
    assert read_run(folder).outcome == "unfinished"


def test_a_killed_run_is_not_extended_before_it_has_made_its_best_weights_again(
    flags: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, seed_step = tmp_path / "run", training.seed_step

    def interrupted(recipe: Train, step: int, *more: int) -> torch.Tensor:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return seed_step(recipe, step, *more)

    with monkeypatch.context() as patched:
        patched.setattr(training, "seed_step", interrupted)
        assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 130
    shutil.copy(run / "weights.safetensors", folder)  # of step 12, as if it had been killed then
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(folder), "--train.steps=20"]) == 2
    assert "weights are of step 12, after its checkpoint of step 6; resume it without" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(run)
    assert cli.main(["train", "--resume", str(folder), "--train.steps=20"]) == 0
