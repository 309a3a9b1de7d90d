"""Corpora: which text is train, valid and test, from real files, and every file that is refused."""

import gzip
import lzma
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from statefeed.lm.config import Data, UsageError
from statefeed.lm.data import corpora
from statefeed.lm.data.corpora import Corpus


def read(path: Path, **more: float) -> Corpus:
    return corpora.read(Data(corpus="text", path=str(path), **more))  # type: ignore[arg-type]


def test_contiguous_splits_are_the_text_and_begin_at_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    splits = read(tmp_path / "a.txt").splits
    assert "".join(splits.values()) == text
    assert all(part.endswith("\n") for part in splits.values())
    for split, share in (("train", 0.9), ("valid", 0.05), ("test", 0.05)):
        assert abs(len(splits[split]) / len(text) - share) < 0.002


def test_split_fractions_are_configured_and_zero_gives_no_test_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    splits = read(tmp_path / "a.txt", valid=0.2, test=0.0).splits
    assert {split: len(part) for split, part in splits.items()} == {"train": 800, "valid": 200}


@pytest.mark.parametrize(
    "text",
    [
        "word " * 200 + "\n",  # one line, as of a text without line ends that an editor has closed by one
        "line\n" * 20 + "x" * 900 + "\nend\n",  # a line longer than the shares of valid and test
        "x" * 930 + "\n" + "y" * 69,  # a last line that begins in front of the cut of the test share
    ],
)
def test_long_lines_leave_no_split_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    splits = read(tmp_path / "a.txt").splits
    assert list(splits) == ["train", "valid", "test"]
    assert "".join(splits.values()) == text


@pytest.mark.parametrize(
    ("text", "shares", "sentence"),
    [
        ("abc", {}, "data.valid=0.05 and data.test=0.05 leave nothing of 3 characters to validate on"),
        ("abc", {"valid": 0.9, "test": 0.05}, "leave nothing of 3 characters to train on"),
    ],
)
def test_a_text_too_short_for_its_splits_raises(
    tmp_path: Path, text: str, shares: dict[str, float], sentence: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        read(tmp_path / "a.txt", **shares)


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_published_splits_plain_and_compressed(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    for name, text in (("ptb.train.txt", "ä train\n"), ("ptb.valid.txt", "ä valid\n"), ("README.md", "not a split\n")):
        (tmp_path / (name + suffix)).write_bytes(pack(text.encode()))
    corpus = read(tmp_path)
    assert corpus.splits == {"train": "ä train\n", "valid": "ä valid\n"}
    assert corpus.sizes == {"train": 9, "valid": 9}
    assert corpus.name == tmp_path.name


@pytest.mark.parametrize("valid", ["valid.txt", "wiki.valid.tokens", "validation.txt", "val-00.txt", "dev.txt"])
def test_names_of_the_validation_file(tmp_path: Path, valid: str) -> None:
    for name in ("wiki.train.tokens", valid, "test.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path).splits == {"train": "wiki.train.tokens", "valid": valid, "test": "test.txt"}


def test_a_folder_without_splits_is_one_text_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name[0] * 50)
    assert "".join(read(tmp_path).splits.values()) == "a" * 50 + "\n" + "b" * 50


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in (("a.txt", "\ufeffa\n" * 40), ("b.txt", "\ufeffb\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert "".join(read(tmp_path).splits.values()) == "a\n" + "\ufeffa\n" * 39 + "b\n"


def test_invalid_files_raise(tmp_path: Path) -> None:
    files = {
        "empty.txt": (b"  \n", "empty.txt is empty"),
        "mark.txt": (b"\xef\xbb\xbf\n", "mark.txt is empty"),
        "latin.txt": (b"caf\xe9 au lait", r"latin.txt is not UTF-8 text: byte 0xe9 at offset 3 cannot be decoded"),
        "broken.xz": (b"not xz at all", "broken.xz cannot be unpacked as .xz"),
        "broken.gz": (b"not gz at all", "broken.gz cannot be unpacked as .gz"),
        "cut.gz": (gzip.compress(b"a" * 1000)[:-12], "cut.gz cannot be unpacked as .gz"),
        "cut.xz": (lzma.compress(b"a" * 1000)[:-12], "cut.xz cannot be unpacked as .xz"),
        "junk.xz": (lzma.compress(b"a" * 1000) + b"junk", "junk.xz cannot be unpacked as .xz"),
        "junk.gz": (gzip.compress(b"a" * 1000) + b"junk", "junk.gz cannot be unpacked as .gz"),
        "utf16.txt": ("a text".encode("utf-16-le"), "6 of its 12 characters are NUL, as in UTF-16 or UTF-32"),
        "utf32.txt": ("a text".encode("utf-32-be"), "18 of its 24 characters are NUL"),
    }
    for name, (raw, sentence) in files.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(UsageError, match=sentence):
            read(tmp_path / name)


def test_packed_streams_one_after_the_other_are_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"one\n" * 9) + lzma.compress(b"two\n") + b"\0" * 4)
    assert "".join(read(tmp_path / "a.xz").splits.values()) == "one\n" * 9 + "two\n"


def test_files_of_one_text_begin_at_the_start_of_a_line(tmp_path: Path) -> None:
    for name, text in (("a.txt", "alpha"), ("b.txt", "beta\n"), ("c.txt", "gamma" * 9)):
        (tmp_path / name).write_text(text)
    assert "".join(read(tmp_path).splits.values()) == "alpha\nbeta\n" + "gamma" * 9


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.txt", "valid.txt", "test-of-faith.txt"], ["train", "valid"]),
        (["train_en.txt", "val_en.txt", "test_en.txt"], ["train", "valid", "test"]),
        (["train-00000-of-00001.txt", "validation-00000-of-00001.txt"], ["train", "valid"]),
        (["my_train.txt", "dev"], ["train", "valid"]),
        (["train.txt", "valid.txt", "train.old.txt"], ["train", "valid"]),
        (["test-of-faith.txt", "dev-ices.txt", "emma.txt"], None),
    ],
)
def test_which_names_are_those_of_splits(
    names: list[str], splits: list[str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / name).write_text(name * 50)
    corpus = read(tmp_path)
    if splits is None:
        assert "".join(corpus.splits.values()) == "\n".join(name * 50 for name in sorted(names))
        assert capsys.readouterr().err == ""
    else:
        used = sorted(names, key=lambda name: ("old" in name, "test" in name, "train" not in name))[: len(splits)]
        assert list(corpus.splits.items()) == [(s, n * 50) for s, n in zip(splits, used, strict=True)]


def test_unread_files_give_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.txt", "valid.txt", "chapter2.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "more").mkdir()
    read(tmp_path)
    assert capsys.readouterr().err == (
        f"statefeed: data.path: of {tmp_path} train.txt, valid.txt are read; chapter2.txt, more/ are not read\n"
    )


@pytest.mark.parametrize("names", [("a.txt", "a.txt.bak", "a.txt.gz"), ("a.txt.gz", "a.txt.xz")])
def test_a_file_that_is_there_packed_as_well_is_not_read_twice(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
        (tmp_path / name).write_bytes(pack(b"the same\n"))
    with pytest.raises(UsageError, match=f"{names[0]} and .*{names[-1]} are the same file, one of them packed"):
        read(tmp_path)


def test_one_text_as_two_splits_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, text in {"train": "one\n", "valid": "two\n", "test": "two\n"}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    read(tmp_path)
    assert capsys.readouterr().err.startswith(f"statefeed: the valid and test splits of {tmp_path.name} are the same")


def test_one_text_as_train_and_valid_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "valid"):
        (tmp_path / f"ptb.{split}.txt").write_text("the same\n")
    for kind in ("text", "ptb"):
        corpora.read(Data(corpus=kind, path=str(tmp_path)))  # type: ignore[arg-type]
        assert "are the same text" in capsys.readouterr().err


def test_cr_line_ends_give_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"one line\rtwo\r" * 20)
    read(tmp_path / "a.txt")
    assert "a.txt has CR line ends" in capsys.readouterr().err


def test_invalid_folders_raise(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no files"):
        read(tmp_path)
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(UsageError, match="has train but no valid file"):
        read(tmp_path)
    (tmp_path / "old.train.txt").write_text("a")
    with pytest.raises(UsageError, match="are both named as the train split"):
        read(tmp_path)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library in place of the real one."""
    files = {f"m{i}.py": f'"""Module {i}.\n\n    Same paragraph.\n"""\n' for i in range(60)}
    files |= {f"{skipped}/m.py": '"""Never read."""\n' for skipped in ("test", "json/tests", "site-packages", "x/test")}
    files["json/m.py"] = (
        'raise SystemExit\nclass A:\n    """In a class."""\n    async def f(self):\n        """In a method."""\n'
        'if True:\n    def g():\n        """In a branch."""\n    h = lambda: """No docstring."""\n'
    )
    files["pydoc_data/topics.py"] = "# generated\ntopics = {'assert': 'About\\n\\nassert.', 'if': 'Same  paragraph.'}\n"
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_pydoc_reads_docstrings_and_topics_without_importing(library: Path) -> None:
    whole = "".join(corpora.read(Data(valid=0.2, test=0.2)).splits.values())
    for part in ("Module 0.", "Module 59.", "In a class.\n\nIn a method.\n\nIn a branch.", "About\n\nassert."):
        assert part in whole
    assert whole.count("Same paragraph.") == 1
    assert "Same  paragraph." not in whole
    assert "Never read." not in whole
    assert "No docstring." not in whole


def test_pydoc_keeps_a_document_in_its_split_whatever_else_there_is(library: Path) -> None:
    before = corpora.read(Data(valid=0.2, test=0.2)).splits
    for i in range(60, 80):
        (library / f"m{i}.py").write_text(f'"""Module {i}."""\n')
    after = corpora.read(Data(valid=0.2, test=0.2)).splits
    for split, text in before.items():
        assert set(text.split("\n\n")) <= {part + end for part in after[split].split("\n\n") for end in ("", "\n")}


def test_pydoc_of_a_python_without_documentation(library: Path) -> None:
    (library / "pydoc_data" / "topics.py").unlink()
    with pytest.raises(UsageError, match="this Python has no documentation"):
        corpora.read(Data())


def test_pydoc_with_too_small_a_fraction_raises(library: Path) -> None:
    with pytest.raises(UsageError, match="leaves a split of the pydoc corpus without a document"):
        corpora.read(Data(valid=1e-9))


def test_pydoc_is_about_two_megabytes_and_its_splits_share_no_paragraph() -> None:
    corpus = corpora.read(Data())
    total = sum(corpus.sizes.values())
    assert 1.2e6 < total < 4e6
    assert corpus.sizes["train"] > 0.8 * total
    paragraphs = {split: {" ".join(p.split()) for p in text.split("\n\n")} for split, text in corpus.splits.items()}
    assert min(len(p) for p in paragraphs.values()) > 50
    assert not paragraphs["train"] & paragraphs["valid"]
    assert not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["valid"] & paragraphs["test"]


PACKED = [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
@pytest.mark.parametrize(
    ("corpus", "form"), [("ptb", "ptb.{}.txt"), ("wikitext", "wiki.{}.tokens"), ("wikitext", "wiki.{}.raw")]
)
def test_published_corpora_in_every_form(
    tmp_path: Path, corpus: str, form: str, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / (form.format(split) + suffix)).write_bytes(pack(f" = ä {split} = \n".encode()))
    (tmp_path / "README.md").write_text("not a split\n")
    data = Data(corpus=corpus, path=str(tmp_path))  # type: ignore[arg-type]
    splits = corpora.read(data).splits
    assert splits == {split: f" = ä {split} = \n" for split in ("train", "valid", "test")}
    assert list(splits) == ["train", "valid", "test"]
    (tmp_path / (form.format("test") + suffix)).unlink()
    assert corpora.read(data).splits.keys() == {"train", "valid"}


def test_invalid_published_corpora_raise(tmp_path: Path) -> None:
    def refused(corpus: str, sentence: str) -> None:
        with pytest.raises(UsageError, match=sentence) as error:
            corpora.read(Data(corpus=corpus, path=str(tmp_path / "given")))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)

    refused("ptb", r"there is no folder .*given; data.corpus=ptb reads the files of one")
    (tmp_path / "given").mkdir()
    refused("ptb", r"holds no ptb.train.txt \(plain, .gz or .xz\), which data.corpus=ptb reads; it holds nothing")
    (tmp_path / "given" / "ptb.train.txt").write_text("a b\n")
    refused("ptb", r"holds no ptb.valid.txt .* it holds ptb.train.txt")
    refused("wikitext", r"holds no wiki.train.tokens or wiki.train.raw .* it holds ptb.train.txt")
    (tmp_path / "given" / "ptb.train.txt.xz").write_bytes(lzma.compress(b"a b\n"))
    refused("ptb", r"ptb.train.txt and .*ptb.train.txt.xz are the same split: remove one")
    for form in ("tokens", "raw"):
        for split in ("train", "valid"):
            (tmp_path / "given" / f"wiki.{split}.{form}").write_text("a\n")
    refused("wikitext", r"holds wiki.\*.tokens and wiki.\*.raw: keep one form")


class Hub:
    """The package `datasets`, as far as the reader knows it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def load_dataset(self, repository: str, name: str) -> dict[str, dict[str, list[str]]]:
        self.asked.append((repository, name))
        if name == "wikitext-9":
            raise ValueError("BuilderConfig 'wikitext-9' not found.\nAvailable: ...")
        rows = {"train": ["", " = A = \n", "", " b <unk> c \n"], "validation": ["", " d \n"], "test": [" e \n"]}
        return {split: {"text": text} for split, text in rows.items()}


def test_wikitext_of_the_hub_is_the_text_of_its_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]
    corpus = corpora.read(Data(corpus="wikitext", path="hub:wikitext-103-v1"))
    assert hub.asked == [("Salesforce/wikitext", "wikitext-103-v1")]
    assert corpus.name == "wikitext-103-v1"
    assert corpus.splits == {"train": " \n = A = \n \n b <unk> c \n", "valid": " \n d \n", "test": " e \n"}
    assert "reading wikitext-103-v1 from the Hugging Face Hub" in capsys.readouterr().err
    with pytest.raises(UsageError, match="wikitext-9 cannot be read from the Hub: BuilderConfig") as refused:
        corpora.read(Data(corpus="wikitext", path="hub:wikitext-9"))
    assert "\n" not in str(refused.value)


def test_the_hub_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the package datasets, .* pip install .statefeed\[datasets\]."):
        corpora.read(Data(corpus="wikitext", path="hub:wikitext-2-v1"))


@pytest.mark.parametrize("path", [".", "../a", "b/.."])
def test_a_corpus_has_the_name_of_its_folder_however_it_is_spelled(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for split in ("train", "valid"):
        (tmp_path / "a" / f"ptb.{split}.txt").write_text(f"a {split} line\n")
    monkeypatch.chdir(tmp_path / "a")
    assert corpora.read(Data(corpus="ptb", path=path)).name == "a"
    assert corpora.read(Data(corpus="text", path=path)).name == "a"
