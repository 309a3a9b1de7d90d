"""The cache of tokens: the same ids as without it, mapped from disk, whole or made again, whoever else is writing."""

import multiprocessing
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from statefeed.lm.config import Data
from statefeed.lm.data import cache, tokens
from statefeed.lm.data.tokens import Tokenizer

TEXT = "one two three two\nthree three four\n" * 50


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test, in which everything is worth it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache, "MIN_CACHED_BYTES", 1)
    return tmp_path / "home" / "statefeed" / "tokens"


@pytest.fixture
def words() -> Tokenizer:
    return tokens.train(Data(tokens="word"), {"train": TEXT})


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_ids_are_those_of_the_tokenizer_and_are_made_once(
    kind: Literal["char", "byte", "word", "bpe"], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokens.train(Data(tokens=kind), {"train": TEXT})
    expected = tokenizer.encode(TEXT)
    assert cache.encode(tokenizer, TEXT).tolist() == expected.tolist()
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(type(tokenizer), "encode", None)
    again = cache.encode(tokenizer, TEXT)
    assert isinstance(again, np.memmap)
    assert again.dtype == np.int32
    assert again.tolist() == expected.tolist()
    assert not again.flags.writeable


def test_text_and_tokenizer_decide_the_entry(words: Tokenizer, folder: Path) -> None:
    other = tokens.train(Data(tokens="word", eos=False), {"train": TEXT})
    for tokenizer, text in ((words, TEXT), (words, TEXT + "four\n"), (other, TEXT), (words, TEXT)):
        assert cache.encode(tokenizer, text).tolist() == tokenizer.encode(text).tolist()
    assert len(list(folder.iterdir())) == 3


def test_byte_pairs_are_found_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(tokens="bpe", vocabulary=270)
    first = cache.tokenizer(data, {"train": TEXT})
    assert first.to_json() == tokens.train(data, {"train": TEXT}).to_json()
    cache.tokenizer(Data(tokens="bpe", vocabulary=271), {"train": TEXT})
    cache.tokenizer(Data(tokens="word"), {"train": TEXT})
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(tokens, "train", None)
    assert cache.tokenizer(data, {"train": TEXT}).to_json() == first.to_json()


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "longer"])
def test_a_corrupt_entry_is_written_again_with_a_notice(
    damage: str, words: Tokenizer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.encode(words, TEXT)
    (entry,) = folder.iterdir()
    content = entry.read_bytes()
    broken = {"cut": content[:-5], "altered": b"\7" + content[1:], "empty": b"", "longer": content + b"\0" * 4}
    entry.write_bytes(broken[damage])
    assert capsys.readouterr().err == ""
    assert cache.encode(words, TEXT).tolist() == words.encode(TEXT).tolist()
    err = capsys.readouterr().err
    assert err == f"statefeed: {entry} is broken, perhaps by a full disk: the text is tokenized again\n"
    assert entry.read_bytes() == content
    assert list(folder.iterdir()) == [entry]


def test_a_cache_that_cannot_be_written_is_done_without(
    words: Tokenizer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    assert cache.encode(words, TEXT).tolist() == words.encode(TEXT).tolist()
    err = capsys.readouterr().err
    assert "cannot be written for the next time: File exists" in err
    assert err.count("\n") == 1


def test_an_interrupted_write_leaves_no_file(words: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.encode(words, TEXT)
    assert list(folder.iterdir()) == []


def test_small_texts_are_not_cached(words: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MIN_CACHED_BYTES", 1 << 20)
    assert cache.encode(words, TEXT).tolist() == words.encode(TEXT).tolist()
    cache.tokenizer(Data(tokens="bpe"), {"train": TEXT})
    assert not folder.exists()


def _encode(times: int) -> bool:
    """In a process of its own: whether every reading gives the ids of the text."""
    cache.MIN_CACHED_BYTES = 1
    words = tokens.train(Data(tokens="word"), {"train": TEXT})
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "statefeed" / "tokens"
    expected = words.encode(TEXT).tolist()
    same = True
    for time in range(times):
        same &= cache.encode(words, TEXT).tolist() == expected
        if time % 3 == 0:
            for entry in folder.iterdir():
                entry.unlink(missing_ok=True)
    return same


def test_processes_can_use_the_cache_at_the_same_time(folder: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_encode, [30, 30]) == [True, True]
