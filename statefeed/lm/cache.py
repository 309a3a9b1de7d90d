"""Owns the cache of tokenised text: ids on disk under the hash of text and tokenizer, mapped into memory.

An entry is the ids, int32, and behind them the sha256 of their bytes. It appears whole or not at all, and every process
that makes the same one makes the same bytes, so that it does not matter which comes last.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from statefeed.lm.tokens import Tokenizer

WORTH_IT = 1 << 20  # bytes of text; less is tokenised in no time


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    """The ids of a text, int32 (N,), from the cache where they have been made before.

    The cache is `statefeed/tokens` in the user's cache folder, `$XDG_CACHE_HOME` or `~/.cache`; deleting it costs time
    and nothing else. Texts of less than a mebibyte are not kept. A broken entry is made anew, and a cache that cannot
    be written is done without, each with a sentence on stderr.

    Args:
        tokenizer: of any kind.
        text: one split of a corpus.
    """
    raw = text.encode()
    if len(raw) < WORTH_IT:
        return tokenizer.encode(text)
    key = hashlib.sha256(tokenizer.to_json().encode() + b"\0" + raw).hexdigest()
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statefeed" / "tokens" / key
    if path.is_file():
        ids = _read(path)
        if ids is not None:
            return ids
        print(f"statefeed: {path} is broken, perhaps by a full disk: the text is tokenised again", file=sys.stderr)
    ids = tokenizer.encode(text)
    try:
        _write(path, ids)
    except OSError as error:
        print(f"statefeed: {path} cannot be written and the ids stay in memory: {error.strerror}", file=sys.stderr)
        return ids
    return np.memmap(path, np.int32, "r", shape=ids.shape)


def _read(path: Path) -> NDArray[np.int32] | None:
    """The ids of an entry, or None where it is not what was written."""
    count, odd = divmod(path.stat().st_size - hashlib.sha256().digest_size, 4)
    if count < 1 or odd:
        return None
    ids = np.memmap(path, np.int32, "r", shape=(count,))
    with path.open("rb") as file:
        file.seek(4 * count)
        return ids if hashlib.sha256(ids.data).digest() == file.read() else None


def _write(path: Path, ids: NDArray[np.int32]) -> None:
    """Put an entry into its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(handle, "wb") as file:
            file.write(ids.data)
            file.write(hashlib.sha256(ids.data).digest())
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink()
        raise
