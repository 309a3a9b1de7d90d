"""Standard output that is closed, full, or of an encoding that the text does not fit: no work ends with it."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import metrics

from statefeed.lm import cli
from statefeed.lm.run import output

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Failing(io.StringIO):
    """A stream that takes one line and fails from then on."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.getvalue():
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (ValueError("I/O operation on closed file"), "it is closed"),
    ],
)
def test_training_continues_when_its_output_fails(
    error: Exception,
    why: str,
    flags: list[str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(error))
    assert cli.main(["train", *flags, f"--run.dir={tmp_path / 'run'}"]) == 0
    assert metrics(tmp_path / "run") == metrics(run)
    assert capsys.readouterr().err == (
        f"statefeed: standard output cannot be written any more ({why}): the work continues without it\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="pipes and shells of POSIX")
@pytest.mark.parametrize(
    "way", ["exec 3>&1; {command} | :", "{command} 2>&1 | :", "{command} >&-", "{command} >&- 2>&-"]
)
def test_training_continues_without_a_reader(way: str, flags: list[str], run: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "statefeed", "train", *flags, f"--run.dir={tmp_path / 'run'}"]
    command = '{ "$@"; echo $? >code; }'
    script = way.replace("{command}", command)
    done = subprocess.run(
        ["sh", "-c", script, "sh", *words], cwd=tmp_path, env=ENVIRONMENT, check=False, capture_output=True, text=True
    )
    assert (tmp_path / "code").read_text() == "0\n", done.stderr
    assert "Traceback" not in done.stderr
    assert metrics(tmp_path / "run") == metrics(run)


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_text_that_the_encoding_of_stdout_lacks_is_replaced(flags: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("été à Noël, cœur et façade :smile:\n" * 200, encoding="utf-8")
    folder = tmp_path / "run"
    flags = [*(flag for flag in flags if "path" not in flag), f"--data.path={text}", f"--run.dir={folder}"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for words in (["train", *flags], ["generate", str(folder), "--tokens=200"]):
        done = subprocess.run(
            [sys.executable, "-m", "statefeed", *words], env=environment, check=False, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "?" in done.stdout


def test_text_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    output.console(soft_wrap=True).print("a :smile: [bold]b[/bold] 12")
    assert capsys.readouterr().out == "a :smile: [bold]b[/bold] 12\n"
