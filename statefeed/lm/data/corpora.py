"""The corpora: which text is train, valid and test, the same on every reading."""

import ast
import hashlib
import importlib
import itertools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from statefeed.lm.config import Data
from statefeed.lm.data.text_files import SPLITS, decode, join, split_files
from statefeed.lm.errors import UsageError, notify
from statefeed.lm.recipe import expand

KINDS = {  # what data.corpus takes
    "pydoc": "help topics and docstrings of the Python that runs this, about 2 MB of English; no file to fetch",
    "ptb": "Penn Treebank as Mikolov prepared it, licensed by the LDC: ptb.train.txt, ptb.valid.txt and, if you have "
    "it, ptb.test.txt in the folder data.path",
    "wikitext": "WikiText-2 or WikiText-103, CC BY-SA: wiki.train.tokens, wiki.valid.tokens and, if you have it, "
    "wiki.test.tokens, or the .raw ones, in the folder data.path; data.path=hub:wikitext-2-v1 fetches them with the "
    "extra statefeed[datasets]",
    "text": "your own UTF-8 text in data.path: a file, a folder of files, or a folder whose files name their splits "
    "(train, valid, test)",
}
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Text in splits.

    Args:
        name: what the corpus is called in records.
        splits: text by split; train and valid are always there, test where the corpus has one.
    """

    name: str
    splits: dict[str, str]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes of every split as UTF-8."""
        return {split: len(text.encode()) for split, text in self.splits.items()}

    @cached_property
    def digests(self) -> dict[str, str]:
        """The sha256 of every split as UTF-8."""
        return {split: hashlib.sha256(text.encode()).hexdigest() for split, text in self.splits.items()}


def read(data: Data) -> Corpus:
    """The corpus that a recipe names.

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


# pydoc: the documentation inside Python ------------------------------------------------------------------------------


def _pydoc(data: Data) -> Corpus:
    """Help topics and docstrings of the standard library, in the order of the hashes of their names.

    So neighbors have nothing in common, and a document stays in its split whatever else a Python holds. A paragraph
    that came before is left out, so that no split repeats a paragraph of another.
    """
    seen: set[str] = set()
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for place, text in sorted((_place(name), text) for name, text in _documents()):
        new = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                new.append(paragraph.rstrip())
        if new:
            split = "valid" if place < data.valid else "test" if place < data.valid + data.test else "train"
            splits[split].append("\n\n".join(new))
    texts = {split: "\n\n".join(documents) + "\n" for split, documents in splits.items() if documents}
    if not {"train", "valid"} <= texts.keys():
        raise UsageError(
            f"data.valid={data.valid} leaves a split of the pydoc corpus without a document: "
            "expected a share that leaves some of its several hundred documents to each split"
        )
    return Corpus("pydoc", texts)


def _documents() -> Iterator[tuple[str, str]]:
    """Name and text of every help topic and every documented module, read from source and never imported."""
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


def _place(name: str) -> float:
    """The position of a document in [0, 1): the hash of its name as a fraction."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


# ptb, wikitext: the corpora of the papers ----------------------------------------------------------------------------


def _ptb(data: Data) -> Corpus:
    """Penn Treebank in Mikolov's preparation: one sentence a line, words between spaces."""
    return _published("ptb", data, ["ptb.{}.txt"])


def _wikitext(data: Data) -> Corpus:
    """WikiText-2 or WikiText-103, with `<unk>` for rare words (tokens) or as it was written (raw)."""
    assert data.path is not None
    if data.path.startswith("hub:"):
        return _hub(data.path.removeprefix("hub:"))
    return _published("wikitext", data, ["wiki.{}.tokens", "wiki.{}.raw"])


def _published(corpus: str, data: Data, forms: list[str]) -> Corpus:
    """The files of one form in a folder, plain or packed; the test split may be missing.

    Args:
        corpus: its name in recipes.
        data: names the folder.
        forms: names of the files with {} for the split, of which the folder holds one.
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
            held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise UsageError(
                f"data.path: the folder {folder} holds no {names[split]} (plain, .gz or .xz), which "
                f"data.corpus={corpus} reads; it holds {held}"
            )
    return Corpus(folder.name, {split: decode(path) for split, path in files.items()})


def _hub(name: str) -> Corpus:
    """A WikiText of the Hugging Face Hub, line by line what its file has; an empty line is a space there."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UsageError(
            f"data.path=hub:{name} needs the package datasets, which is not installed: pip install statefeed[datasets]"
        ) from None
    notify(f"reading {name} from the Hugging Face Hub, or from what was fetched before")
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", name)
    except Exception as error:  # of many kinds: no network, no such name, no space
        raise UsageError(f"data.path: {name} cannot be read from the Hub: {' '.join(str(error).split())}") from error
    splits = {"train": "train", "valid": "validation", "test": "test"}
    return Corpus(
        name, {split: "".join(line or " \n" for line in rows[there]["text"]) for split, there in splits.items()}
    )


# text: the user's own files ------------------------------------------------------------------------------------------


def _text(data: Data) -> Corpus:
    """A file or folder: its own splits where its files name them, else contiguous shares of the whole."""
    assert data.path is not None
    path = expand(data.path)
    if path.is_file():
        return Corpus(path.name, _contiguous(decode(path), data))
    given, whole = split_files(path)
    if given:
        return Corpus(path.name, {split: decode(given[split]) for split in SPLITS if split in given})
    return Corpus(path.name, _contiguous(join(decode(file) for file in whole), data))


def _contiguous(text: str, data: Data) -> dict[str, str]:
    """Train, valid and test one after the other, split at the start of a line where that leaves no split empty.

    Raises:
        UsageError: when there is too little text for the shares.
    """
    places = [round(share * len(text)) for share in (1 - data.valid - data.test, 1 - data.test)]
    lines = [text.find("\n", place) + 1 or place for place in places]
    first, second = lines if lines[0] < lines[1] and (lines[1] < len(text) or not data.test) else places
    splits = dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))
    if not (splits["train"] and splits["valid"]):
        raise UsageError(
            f"data.valid={data.valid} and data.test={data.test} leave nothing of {len(text):,} characters to "
            f"{'validate' if splits['train'] else 'train'} on"
        )
    return {split: part for split, part in splits.items() if part}
