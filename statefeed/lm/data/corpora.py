"""Corpora: their text in the splits train, valid and test, the same in every run."""

import ast
import hashlib
import importlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from statefeed.lm.config import Data
from statefeed.lm.data.text_files import SPLITS, decode, join, split_files
from statefeed.lm.errors import UsageError, notify
from statefeed.lm.recipe import expand

KINDS = {  # values of data.corpus
    "pydoc": "help topics and docstrings of the Python that runs this, about 2 MB of English; no file to fetch",
    "ptb": "Penn Treebank as Mikolov prepared it, licensed by the LDC: ptb.train.txt, ptb.valid.txt and, if you have "
    "it, ptb.test.txt in the folder data.path",
    "wikitext": "WikiText-2 or WikiText-103, CC BY-SA: wiki.train.tokens, wiki.valid.tokens and, if you have it, "
    "wiki.test.tokens, or the .raw ones, in the folder data.path; data.path=hub:wikitext-2-v1 fetches them with the "
    "extra datasets",
    "text": "your own UTF-8 text in data.path: a file, a folder of files, or a folder whose files name their splits "
    "(train, valid, test)",
}
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """The text of a corpus in splits.

    Args:
        name: the name of the corpus in records.
        splits: text by split; always train and valid, and test if the corpus has a test split.
    """

    name: str
    splits: dict[str, str]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of every split in bytes of UTF-8."""
        return {split: len(text.encode()) for split, text in self.splits.items()}

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of every split in UTF-8."""
        return {split: hashlib.sha256(text.encode()).hexdigest() for split, text in self.splits.items()}


def read(data: Data) -> Corpus:
    """Read the corpus that a recipe names.

    Raises:
        UsageError: when a file is missing, empty or not UTF-8 text.
    """
    check_path(data)
    corpus = {"pydoc": _pydoc, "ptb": _ptb, "wikitext": _wikitext, "text": _text}[data.corpus](data)
    for first, second in itertools.combinations(corpus.splits, 2):
        if corpus.splits[first] == corpus.splits[second]:
            notify(
                f"the {first} and {second} splits of {corpus.name} are the same text: scores of {second} say nothing "
                "of other text"
            )
    return corpus


def check_path(data: Data) -> None:
    """Check that the file or folder that a recipe names is there.

    Raises:
        UsageError: when it is not.
    """
    if data.path is None or data.path.startswith("hub:"):
        return
    path = expand(data.path)
    if data.corpus == "text" and not (path.is_file() or path.is_dir()):
        raise UsageError(f"data.path: there is no file or folder {path}: name the text with --data.path")
    if data.corpus != "text" and not path.is_dir():
        raise UsageError(
            f"data.path: there is no folder {path}; data.corpus={data.corpus} reads the files of one: name it with "
            "--data.path"
        )


def _name(path: Path) -> str:
    """The name of a file or folder, also where its path is . or .. and has none."""
    return Path(os.path.abspath(path)).name


# pydoc: the documentation inside Python ------------------------------------------------------------------------------


def _pydoc(data: Data) -> Corpus:
    """Help topics and docstrings of the standard library, in the order of the hashes of their names.

    Neighboring documents are therefore unrelated, and the split of a document does not depend on the other documents.
    Repeated paragraphs are left out, so that no split repeats a paragraph of another.
    """
    seen: set[str] = set()
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for position, text in sorted((_position(name), text) for name, text in _documents()):
        new = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                new.append(paragraph.rstrip())
        if new:
            split = "valid" if position < data.valid else "test" if position < data.valid + data.test else "train"
            splits[split].append("\n\n".join(new))
    texts = {split: "\n\n".join(documents) + "\n" for split, documents in splits.items() if documents}
    if not {"train", "valid"} <= texts.keys():
        raise UsageError(
            f"data.valid={data.valid} leaves a split of the pydoc corpus without a document: "
            "expected a share that leaves some of its several hundred documents to each split"
        )
    return Corpus("pydoc", texts)


def _documents() -> Iterator[tuple[str, str]]:
    """Name and text of every help topic and every documented module, from the source without importing it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise UsageError(f"this Python has no documentation ({topics} is missing): use --data.corpus=text")
    for statement in ast.parse(topics.read_bytes()).body:
        if isinstance(statement, ast.Assign):
            for name, text in ast.literal_eval(statement.value).items():
                yield f"topic {name}", text
    for path in library.rglob("*.py"):
        module = path.relative_to(library)
        if _SKIPPED.isdisjoint(module.parts) and path != topics:
            yield f"module {module.as_posix()}", "\n\n".join(_docstrings(path.read_bytes()))


def _docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions, in the order of the source."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        pending.extend(child for child in reversed(list(ast.iter_child_nodes(node))) if not isinstance(child, ast.expr))


def _position(name: str) -> float:
    """The position of a document in [0, 1): the hash of its name as a fraction."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


# ptb, wikitext: the corpora of the papers ----------------------------------------------------------------------------


def _ptb(data: Data) -> Corpus:
    """Penn Treebank in Mikolov's preparation: one sentence a line, words between spaces."""
    return _published("ptb", data, ["ptb.{}.txt"])


def _wikitext(data: Data) -> Corpus:
    """WikiText-2 or WikiText-103, with `<unk>` for rare words (.tokens) or the original text (.raw)."""
    assert data.path is not None
    if data.path.startswith("hub:"):
        return _hub(data.path.removeprefix("hub:"))
    return _published("wikitext", data, ["wiki.{}.tokens", "wiki.{}.raw"])


def _published(corpus: str, data: Data, forms: list[str]) -> Corpus:
    """Read the files of a published corpus from a folder, plain or compressed; the test split is optional.

    Args:
        corpus: its name in recipes.
        data: its path is the folder.
        forms: patterns of file names, with {} for the split; the folder must hold files of one of them.
    """
    assert data.path is not None
    folder = expand(data.path)
    found: dict[str, dict[str, Path]] = {form: {} for form in forms}
    for form, split in ((form, split) for form in forms for split in SPLITS):
        for path in (folder / (form.format(split) + suffix) for suffix in ("", ".gz", ".xz")):
            if path.is_file():
                if split in found[form]:
                    raise UsageError(f"data.path: {found[form][split]} and {path} are the same split: remove one")
                found[form][split] = path
    there = [form for form in forms if found[form]]
    if len(there) > 1:
        raise UsageError(f"data.path: the folder {folder} holds {' and '.join(there).format('*', '*')}: keep one form")
    names = {split: " or ".join(forms).format(*[split] * len(forms)) for split in SPLITS}
    files = found[there[0]] if there else {}
    for split in ("train", "valid"):
        if split not in files:
            content = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise UsageError(
                f"data.path: the folder {folder} holds no {names[split]} (plain, .gz or .xz), which "
                f"data.corpus={corpus} reads; it holds {content}"
            )
    return Corpus(_name(folder), {split: decode(path) for split, path in files.items()})


def _hub(name: str) -> Corpus:
    """Read a WikiText corpus from the Hugging Face Hub, which stores an empty line as a space."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UsageError(
            f"data.path=hub:{name} needs the package datasets, which is not installed: "
            'pip install "statefeed[datasets]"'
        ) from None
    notify(f"reading {name} from the Hugging Face Hub, or from its local cache")
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", name)
    except Exception as error:  # many kinds: no network, no such name, a full disk
        raise UsageError(f"data.path: {name} cannot be read from the Hub: {' '.join(str(error).split())}") from error
    splits = {"train": "train", "valid": "validation", "test": "test"}
    return Corpus(
        name, {split: "".join(line or " \n" for line in rows[there]["text"]) for split, there in splits.items()}
    )


# text: the user's own files ------------------------------------------------------------------------------------------


def _text(data: Data) -> Corpus:
    """Read a file or folder: the splits that its file names define, else contiguous fractions of the text."""
    assert data.path is not None
    path = expand(data.path)
    if path.is_file():
        return Corpus(_name(path), _contiguous(decode(path), data))
    by_split, unsplit = split_files(path)
    if by_split:
        return Corpus(_name(path), {split: decode(by_split[split]) for split in SPLITS if split in by_split})
    return Corpus(_name(path), _contiguous(join(decode(file) for file in unsplit), data))


def _contiguous(text: str, data: Data) -> dict[str, str]:
    """Split a text into train, valid and test, in this order, at starts of lines unless that makes a split empty.

    Raises:
        UsageError: there is too little text for the fractions.
    """
    ends = [round(fraction * len(text)) for fraction in (1 - data.valid - data.test, 1 - data.test)]
    lines = [text.find("\n", end) + 1 or end for end in ends]
    first, second = lines if lines[0] < lines[1] and (lines[1] < len(text) or not data.test) else ends
    splits = dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))
    if not (splits["train"] and splits["valid"]):
        raise UsageError(
            f"data.valid={data.valid} and data.test={data.test} leave nothing of {len(text):,} characters to "
            f"{'validate' if splits['train'] else 'train'} on"
        )
    return {split: part for split, part in splits.items() if part}
