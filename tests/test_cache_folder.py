"""The cache folder is private, and nothing is loaded from it that another user may have written."""

import errno
import os
import stat
from pathlib import Path

import pytest

from statefeed.lm.config import Data
from statefeed.lm.data import cache, tokens
from statefeed.native import build
from statefeed.native.cache_folder import cache_folder, distrust, make_private

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")
STRANGER = 54321


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "statefeed"


def publish(content: str, target: Path) -> None:
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_text(content)
    unfinished.chmod(0o700)
    os.replace(unfinished, target)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that were compiled, by a compiler that writes a word."""
    made: list[Path] = []

    def compile_library(target: Path, torch: Path, flags: list[str]) -> None:
        publish("ours", target)
        made.append(target)

    monkeypatch.setattr(build, "compile_library", compile_library)
    monkeypatch.setattr(build, "cache_key", lambda: "key")
    return made


def own(path: Path, user: int) -> None:
    try:
        os.chown(path, user, -1)
    except PermissionError:
        pytest.skip("only root may give a file away")


def test_the_folder_is_private_for_every_umask_and_owner(folder: Path) -> None:
    before = os.umask(0)
    try:
        make_private(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777)
        make_private(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_a_library_is_compiled_once(compiled: list[Path], folder: Path) -> None:
    assert build.compiled_library() == build.compiled_library() == folder / "kernels-key.so"
    assert len(compiled) == 1


@pytest.mark.parametrize(("user", "mode"), [(0, 0o757), (0, 0o775), (STRANGER, 0o700)])
def test_a_library_that_other_users_can_write_is_not_loaded(
    user: int, mode: int, compiled: list[Path], folder: Path
) -> None:
    make_private(folder)
    planted = folder / "kernels-key.so"
    planted.write_text("theirs")
    planted.chmod(mode)
    own(planted, user or os.geteuid())
    with pytest.warns(RuntimeWarning, match="kernels-key.so (can be written by others|belongs to user 54321)"):
        assert build.compiled_library() == planted
    assert planted.read_text() == "ours"
    assert distrust(planted) is None


@pytest.mark.parametrize("published", [True, False])
def test_another_process_replaces_the_same_library(
    published: bool, compiled: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_private(folder)
    planted = folder / "kernels-key.so"
    planted.write_text("theirs")
    planted.chmod(0o757)

    def meanwhile(path: Path) -> str | None:
        reason = distrust(path)
        if reason is not None and published:
            publish("of the other process", path)
        elif reason is not None:
            path.unlink()
        return reason

    monkeypatch.setattr(build, "distrust", meanwhile)
    assert build.compiled_library() == planted
    assert planted.read_text() == ("of the other process" if published else "ours")
    assert len(compiled) == (0 if published else 1)


def test_a_file_system_without_locks(compiled: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert build.compiled_library().read_text() == "ours"
    assert len(compiled) == 1


def test_a_folder_of_another_user_is_not_used(
    compiled: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_private(folder)
    own(folder, STRANGER)
    with pytest.raises(OSError, match=f"belongs to user {STRANGER}, .*: set XDG_CACHE_HOME to a folder of your own"):
        build.compiled_library()
    assert not compiled
    monkeypatch.setattr(cache, "MIN_CACHED_BYTES", 1)
    tokenizer = tokens.train(Data(tokens="byte"), {"train": "abc"})
    assert cache.encode(tokenizer, "abc").tolist() == [97, 98, 99]
    assert "tokens are not cached: " in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_a_folder_that_others_could_replace_is_not_used(compiled: list[Path], folder: Path) -> None:
    make_private(folder)
    folder.parent.chmod(0o777)
    with pytest.raises(OSError, match=r"home can be written by others \(mode 777\): set XDG_CACHE_HOME to a folder"):
        build.compiled_library()
    assert not compiled
    folder.parent.chmod(0o1777)  # as /tmp, where only the owner of a folder may rename it
    build.compiled_library()
    assert len(compiled) == 1


def test_tokens_that_other_users_can_write_are_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "MIN_CACHED_BYTES", 1)
    tokenizer = tokens.train(Data(tokens="byte"), {"train": "abc"})
    cache.encode(tokenizer, "abc")
    (entry,) = (folder / "tokens").iterdir()
    cache.write_entry(entry, tokenizer.encode("xyz").data)
    assert cache.encode(tokenizer, "abc").tolist() == [120, 121, 122]  # what one could plant
    entry.chmod(0o666)
    assert cache.encode(tokenizer, "abc").tolist() == [97, 98, 99]
    err = capsys.readouterr().err
    assert err == f"statefeed: {entry} can be written by others (mode 666): the text is tokenized again\n"


def test_a_user_without_a_home_has_no_cache_and_needs_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(OSError, match="no home folder for a cache: set XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setattr(cache, "MIN_CACHED_BYTES", 1)
    tokenizer = tokens.train(Data(tokens="byte"), {"train": "abc"})
    assert cache.encode(tokenizer, "abc").tolist() == [97, 98, 99]
    assert capsys.readouterr().err == (
        "statefeed: tokens are not cached: this user has no home folder for a cache: set XDG_CACHE_HOME to a folder\n"
    )


def test_a_folder_that_cannot_be_created_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"cache folder .*file/statefeed cannot be created .*: set XDG_CACHE_HOME to a folder"
    ):
        make_private(tmp_path / "file" / "statefeed")
