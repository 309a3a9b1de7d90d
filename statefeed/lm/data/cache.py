"""The cache of tokenized text: byte pairs and ids on disk under the hash of what they are made from.

Ids are mapped into memory. An entry is its content followed by the sha256 of it. It appears whole or not at all, and
every process that makes the same one makes the same content, so that it does not matter which comes last.

The cache is `statefeed/tokens` in the user's cache folder, `$XDG_CACHE_HOME` or `~/.cache`; deleting it costs time and
nothing else. Texts of less than a mebibyte are not cached. A broken entry is made again, and without a cache that
can be written everything is made each time, with a sentence on stderr.
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

WORTH_IT = 1 << 20  # bytes of text; less is tokenized in no time
_DIGEST = hashlib.sha256().digest_size


def tokenizer(data: Data, splits: dict[str, str]) -> Tokenizer:
    """The tokenizer that a recipe asks for; byte pairs are taken from the cache where they have been found before.

    Args:
        data: the kind of tokens and how many types.
        splits: text by split.
    """
    if data.tokens != "bpe" or len(splits["train"]) < WORTH_IT or (folder := _folder()) is None:
        return tokens.train(data, splits)
    path = folder / _entry(f"bpe {data.vocabulary} {tokenizers.__version__}", splits["train"])
    found = _read(path)
    if found is not None:
        return tokens.BytePairs.from_json(found.tobytes().decode())
    trained = tokens.train(data, splits)
    _write(path, trained.to_json().encode())
    return trained


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    """The ids of a text, int32 (N,), from the cache where they have been made before.

    Args:
        tokenizer: of any kind.
        text: one split of a corpus.
    """
    if len(text) < WORTH_IT or (folder := _folder()) is None:
        return tokenizer.encode(text)
    path = folder / _entry(tokenizer.to_json(), text)
    found = _read(path)
    if found is None:
        ids = tokenizer.encode(text)
        _write(path, ids.data)
        found = _read(path)
        if found is None:
            return ids
    return found.view(np.int32)


def _folder() -> Path | None:
    """The folder of the cache, whether it is there or not; None, with a sentence, where no cache can be used."""
    try:
        folder = cache_folder()
        if folder.exists():
            make_private(folder)
        return folder / "tokens"
    except OSError as error:
        notify(f"tokens are not cached: {error}")
        return None


def _entry(how: str, text: str) -> str:
    """The name of what is made from a text in some way."""
    return hashlib.sha256(how.encode() + b"\0" + text.encode()).hexdigest()


def _read(path: Path) -> NDArray[np.uint8] | None:
    """The content of an entry, mapped into memory; None if it is missing or damaged."""
    try:
        if reason := distrust(path):
            notify(f"{reason}: the text is tokenized again")
            return None
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > _DIGEST:
                whole = np.memmap(file, np.uint8, "r")
                if hashlib.sha256(whole[:-_DIGEST].data).digest() == whole[-_DIGEST:].tobytes():
                    return whole[:-_DIGEST]
    except OSError:
        return None
    notify(f"{path} is broken, perhaps by a full disk: the text is tokenized again")
    return None


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write an entry whole, or print a sentence that says why that is not possible."""
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
