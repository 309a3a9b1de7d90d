"""Cache of tokenized text: byte pairs and ids on disk, under the hash of the text and the tokenizer.

Ids are memory-mapped. An entry is its content followed by the sha256 of the content. Entries are written atomically.
Processes that write the same entry write the same content, so their order does not matter.

The cache is `statefeed/tokens` in the user's cache folder, `$XDG_CACHE_HOME` or `~/.cache`, and can be deleted at any
time. Texts of less than a mebibyte are not cached. A corrupt entry is written again. If the cache cannot be written,
a notice is printed and the text is tokenized at every start.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from statefeed.lm.config import Data
from statefeed.lm.data import tokens
from statefeed.lm.data.tokens import Tokenizer
from statefeed.lm.errors import notify
from statefeed.native.cache_folder import cache_folder, distrust, make_private

MIN_CACHED_BYTES = 1 << 20  # of text; shorter texts are tokenized in a fraction of a second
_DIGEST = hashlib.sha256().digest_size


def tokenizer(data: Data, splits: dict[str, str]) -> Tokenizer:
    """The tokenizer of a recipe; byte pairs are read from the cache if it has them.

    Args:
        data: the kind of tokens and the number of types.
        splits: text by split.
    """
    if data.tokens != "bpe" or len(splits["train"]) < MIN_CACHED_BYTES or (folder := _folder()) is None:
        return tokens.train(data, splits)
    path = folder / _entry(f"bpe {data.vocabulary} {tokenizers.__version__}", splits["train"])
    found = read_entry(path)
    if found is not None:
        return tokens.BytePairs.from_json(found.tobytes().decode())
    trained = tokens.train(data, splits)
    write_entry(path, trained.to_json().encode())
    return trained


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    """The ids of a text, int32 (N,), from the cache if it has them.

    Args:
        tokenizer: any tokenizer.
        text: one split of a corpus.
    """
    if len(text) < MIN_CACHED_BYTES or (folder := _folder()) is None:
        return tokenizer.encode(text)
    path = folder / _entry(tokenizer.to_json(), text)
    found = read_entry(path)
    if found is None:
        ids = tokenizer.encode(text)
        write_entry(path, ids.data)
        found = read_entry(path)
        if found is None:
            return ids
    return found.view(np.int32)


def _folder() -> Path | None:
    """The folder of the cache, which may not exist yet; None, after a notice, if no cache can be used."""
    try:
        folder = cache_folder()
        if folder.exists():
            make_private(folder)
        return folder / "tokens"
    except OSError as error:
        notify(f"tokens are not cached: {error}")
        return None


def _entry(method: str, text: str) -> str:
    """The file name of the result of applying a method to a text."""
    return hashlib.sha256(method.encode() + b"\0" + text.encode()).hexdigest()


def read_entry(path: Path) -> NDArray[np.uint8] | None:
    """The content of an entry, memory-mapped; None if it is missing or corrupt."""
    try:
        if reason := distrust(path):
            notify(f"{reason}: the text is tokenized again")
            return None
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > _DIGEST:
                entry = np.memmap(file, np.uint8, "r")
                if hashlib.sha256(entry[:-_DIGEST].data).digest() == entry[-_DIGEST:].tobytes():
                    return entry[:-_DIGEST]
    except OSError:
        return None
    notify(f"{path} is broken, perhaps by a full disk: the text is tokenized again")
    return None


def write_entry(path: Path, content: bytes | memoryview) -> None:
    """Write an entry atomically; print a notice if it cannot be written."""
    try:
        make_private(path.parent.parent)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="unfinished-", delete=False) as file:
            try:
                file.write(content)
                file.write(hashlib.sha256(content).digest())
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        notify(f"{path} cannot be written for the next time: {error.strerror or error}")
