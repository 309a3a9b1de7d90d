"""Tokens: every kind takes text apart and puts it together again, before and after it is saved."""

from pathlib import Path
from typing import Literal

import pytest

from statefeed.lm.config import Data, UsageError
from statefeed.lm.data import tokens

TEXT = "the cat: naïve 'café'\n\n    the cat sat — 😀 on the mat\r\n\tthe end\n"
SPLITS = {"train": TEXT * 20, "valid": "the cat Ω\n"}
Kind = Literal["char", "byte", "word", "bpe"]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_text_survives(kind: Kind, tmp_path: Path) -> None:
    data = Data(tokens=kind)
    tokenizer = tokens.train(data, SPLITS)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids.tolist()) == TEXT
    assert 0 <= ids.min() <= ids.max() < tokenizer.size
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    again = tokens.load(data, tmp_path / "tokenizer.json")
    assert again.size == tokenizer.size
    assert again.encode(TEXT).tolist() == ids.tolist()


def test_characters_are_those_of_all_splits() -> None:
    tokenizer = tokens.train(Data(tokens="char"), SPLITS)
    assert tokenizer.decode(tokenizer.encode("Ω").tolist()) == "Ω"
    assert tokenizer.unknown("cat§") == "§"
    assert tokenizer.unknown("cat") is None
    with pytest.raises(UsageError, match="'§' at position 3"):
        tokenizer.encode("cat§")


def test_byte_pairs_merge_and_still_encode_anything() -> None:
    tokenizer = tokens.train(Data(tokens="bpe", vocabulary=280), SPLITS)
    assert tokenizer.size == 280
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode("字Ω").tolist()) == "字Ω"
    assert tokenizer.unknown("字Ω") is None


def test_byte_pairs_are_the_same_every_time() -> None:
    first, second = (tokens.train(Data(tokens="bpe", vocabulary=300), SPLITS).to_json() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "piece", [" = Title = \n \n a text , it 's <unk> \n", "x = 1\n\n    y\n\tz\n  é 😀\n", "\ny\nz\n"]
)
def test_byte_pairs_of_parts_are_those_of_the_text(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (TEXT + piece) * 40
    whole = tokens.BytePairs.train(text, 290)
    expected = whole.encode(text)
    monkeypatch.setattr(tokens, "PART", 7)
    parts = list(tokens.text_parts(text))
    assert len(parts) > 40
    assert "".join(parts) == text
    assert whole.encode(text).tolist() == expected.tolist()
    assert tokens.BytePairs.train(text, 290).to_json() == whole.to_json()


def test_sentences_begin_and_end(tmp_path: Path) -> None:
    data = Data(tokens="word", batches="sentences")
    tokenizer = tokens.train(data, {"train": "b a a\nb\n"})
    assert isinstance(tokenizer, tokens.Words)
    assert tokenizer.words == ["<unk>", "<eos>", "<bos>", "a", "b"]
    assert tokenizer.sentence == (2, 1)
    assert tokenizer.encode("b c\na\n").tolist() == [2, 4, 0, 1, 2, 3, 1, 2]
    assert tokenizer.encode("a b").tolist() == [2, 3, 4]
    assert tokenizer.decode([2, 4, 0, 1, 2, 3, 1, 2]) == "b <unk>\na\n"
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert tokens.load(data, tmp_path / "tokenizer.json").encode("b c\na\n").tolist() == [2, 4, 0, 1, 2, 3, 1, 2]


def test_words_with_unk_and_eos(tmp_path: Path) -> None:
    data = Data(tokens="word", vocabulary=4)
    tokenizer = tokens.train(data, {"train": "b a <unk> c a\nb a\n"})
    ids = tokenizer.encode("a b\nc d\n")
    assert tokenizer.decode(ids.tolist()) == "a b\n<unk> <unk>\n"
    assert ids.tolist() == [2, 3, 1, 0, 0, 1]
    assert tokenizer.unknown("a c b") == "c"
    assert tokenizer.unknown("a <unk>\n") is None
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert tokens.load(data, tmp_path / "tokenizer.json").encode("a b\nc d\n").tolist() == ids.tolist()


def test_words_without_line_ends() -> None:
    tokenizer = tokens.train(Data(tokens="word", eos=False), {"train": "a b\nc\n"})
    assert tokenizer.size == 4
    assert tokenizer.decode(tokenizer.encode("c\nb\n").tolist()) == "c b"


def test_ties_between_words_fall_to_the_alphabet() -> None:
    tokenizer = tokens.train(Data(tokens="word", vocabulary=4, eos=False), {"train": "d c b a d\n"})
    assert tokenizer.decode(range(4)) == "<unk> d a b"


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_a_corrupt_file_raises(kind: Kind, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"tokenizer\.json cannot be read as a tokenizer of {kind} tokens"):
        tokens.load(Data(tokens=kind), path)
