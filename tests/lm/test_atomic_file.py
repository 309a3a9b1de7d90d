"""Files of a run after a power loss: what is renamed is on disk before, and its name afterwards."""

import errno
import os
from pathlib import Path

import pytest

from statefeed.lm import atomic_file, cli
from statefeed.lm.compare import compare, summary

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders are flushed on POSIX only")


class Disk:
    """Checks every rename in a folder: ``renamed`` has the names, ``lost`` what a power loss would have lost."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.renamed, self.lost = set[str](), set[str]()
        self._flushed: dict[int, tuple[int, int]] = {}
        fsync, replace = os.fsync, os.replace

        def flush(handle: int) -> None:
            fsync(handle)
            found = os.fstat(handle)
            self._flushed[found.st_ino] = (found.st_size, found.st_mtime_ns)

        def rename(source: Path, target: Path) -> None:
            before = os.stat(source)
            replace(source, target)
            if folder in Path(target).parents:
                self.renamed.add(Path(target).name)
                if self._flushed.get(before.st_ino) != (before.st_size, before.st_mtime_ns):
                    self.lost.add(Path(target).name)

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "replace", rename)

    def has_the_names_of(self, folder: Path) -> bool:
        """Whether the folder was flushed after the last rename into it."""
        found = folder.stat()
        return self._flushed.get(found.st_ino) == (found.st_size, found.st_mtime_ns)


def test_the_check_finds_what_a_power_loss_would_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, monkeypatch)
    (tmp_path / "new").write_text("text")
    os.replace(tmp_path / "new", tmp_path / "file")
    assert disk.lost == {"file"}
    assert not disk.has_the_names_of(tmp_path)


def test_a_text_is_on_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, monkeypatch)
    atomic_file.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert (disk.renamed, disk.lost) == ({"file"}, set())
    assert disk.has_the_names_of(tmp_path)


def test_a_block_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        atomic_file.write_text(path, "half of it \ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_every_file_of_a_run_and_of_a_comparison(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, folder = Disk(tmp_path, monkeypatch), tmp_path / "run"
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 0
    assert cli.main(["train", "--resume", str(folder), "--train.steps=14"]) == 0
    compare.add_record("a record\n", tmp_path / "compare.jsonl")
    names = {"record.json", "tokenizer.json", "config.yaml", "weights.safetensors", "step-000000014.safetensors"}
    assert disk.renamed >= names | {"compare.jsonl"}
    assert not disk.lost


def _fill(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("flag", ["--output", "--markdown", "--summary", "--verdicts", "--records"])
def test_a_report_on_a_full_disk_leaves_the_file_before(
    flag: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / ("new.jsonl" if flag == "--records" else "page.md"), tmp_path / "page.html"
    if flag != "--records":
        path.write_text(f"mine\n{summary.BEGIN}\n{summary.VERDICTS}\n{summary.END}\n")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    words = ["report", str(run), f"{flag}={path}"] + (["-o", "/dev/null"] if flag == "--records" else [])
    _fill(monkeypatch)
    capsys.readouterr()
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"statefeed: {path}: No space left on device\n"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert cli.main(words) == 0
    assert not page.exists()


def test_an_output_may_be_a_link_or_a_device(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    atomic_file.write_output(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"
    atomic_file.write_output(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
