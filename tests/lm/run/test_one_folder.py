"""One folder, one run: processes that start together, checkpoints that are missing, folders that are removed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import metrics

from statefeed.lm import cli
from statefeed.lm.run import train as training
from statefeed.lm.run.lock import lock

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_of_two_runs_started_together_one_raises_and_changes_no_file(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process makes its run while this one prepares its own."""
    folder = tmp_path / "run"
    prepare, before = training.prepare, list[dict[str, bytes]]()
    code = (
        "import sys; from pathlib import Path; from statefeed.lm.run.lock import lock\n"
        "folder = Path(sys.argv[1]); folder.mkdir()\n"
        "with lock(folder):\n"
        "    (folder / 'config.yaml').write_text('theirs'); (folder / 'tokenizer.json').write_text('theirs')\n"
        "    print('before', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    others = []

    def meanwhile(*arguments: object) -> object:
        setup = prepare(*arguments)  # type: ignore[arg-type]
        others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert others[0].stdout is not None
        assert others[0].stdout.readline() == "before\n"
        before.append(content(folder))
        return setup

    monkeypatch.setattr(training, "prepare", meanwhile)
    try:
        assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"statefeed: {folder} is being trained by another process: ")
        assert "--resume" not in err
        assert err.count("\n") == 1
        assert content(folder) == before[0]
    finally:
        others[0].communicate()


def test_a_run_that_was_made_and_ended_meanwhile_is_not_overwritten(
    flags: list[str],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, prepare = tmp_path / "run", training.prepare

    def meanwhile(*arguments: object) -> object:
        shutil.copytree(run, folder)
        return prepare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "prepare", meanwhile)
    capsys.readouterr()
    assert cli.main(["train", *flags, "--model.width=8", f"--run.dir={folder}"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert content(folder) == content(run)


def test_a_resumed_run_is_locked_before_its_record_is_changed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    monkeypatch.setattr("os.cpu_count", lambda: 7)  # which the record would say
    with lock(folder):
        assert cli.main(["train", "--resume", str(folder)]) == 2
    assert content(folder) == content(run)


def test_a_folder_without_a_created_run_can_be_used(flags: list[str], run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with lock(folder):
        pass
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 0
    assert metrics(folder) == metrics(run)


def without_folder(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)


def without_files(checkpoints: Path) -> None:
    for path in checkpoints.iterdir():
        path.unlink()


@pytest.mark.parametrize("remove", [without_folder, without_files])
def test_a_run_copied_without_checkpoints_is_scored_and_not_resumed(
    remove: Callable[[Path], None], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    remove(folder / "checkpoints")
    before = content(folder)
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert f"{folder} holds metrics of step 12 but no checkpoint" in err
    assert err.count("\n") == 1
    assert content(folder) == before
    assert cli.main(["evaluate", str(folder)]) == 0
    assert cli.main(["generate", str(folder), "--tokens=3"]) == 0


def test_a_folder_that_is_removed_during_training_keeps_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, draw = tmp_path / "run", training.seed_step

    def removed(recipe: object, step: int, *rest: int) -> object:
        if step == 7:
            shutil.rmtree(folder)
        return draw(recipe, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "seed_step", removed)
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 2
    err = capsys.readouterr().err
    assert f"{folder} was removed" in err
    assert err.endswith(f"{folder} was removed\n")
    assert "--resume" not in err
    assert err.count("\n") == 1
