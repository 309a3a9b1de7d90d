"""Tokenizers: text to ids and back, by character, byte, word or byte pair."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from statefeed.lm.config import Data
from statefeed.lm.errors import UsageError, notify

UNKNOWN, END, BEGIN = "<unk>", "<eos>", "<bos>"
BYTE_PAIRS = 4096
PART = 1 << 16  # characters that are encoded at once, which bounds the memory of the encoder
LONG_WORD = 10_000  # characters without white space; a natural language has no such word
MAX_MERGE = 256  # bytes within which byte pairs are merged in a text with a longer word


class Tokenizer(Protocol):
    """Interface of every tokenizer."""

    @property
    def size(self) -> int:
        """V, the number of types."""

    @property
    def sentence(self) -> tuple[int, int] | None:
        """The ids that begin and end a sentence; None if the text is not read sentence by sentence."""

    @property
    def start(self) -> str:
        """The prompt of a sample without another one: the end of a line, or a token where there are no such ends."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids of a text, int32 (N,)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def unknown(self, text: str) -> str | None:
        """The first token of a text that is not in the vocabulary, or None."""

    def to_json(self) -> str:
        """The tokenizer as JSON text, which `load` reads."""


class Characters:
    """One token per character; the types are the characters of the corpus.

    >>> tokens = Characters("abba")
    >>> tokens.encode("baa").tolist(), tokens.decode([1, 0])
    ([1, 0, 0], 'ba')
    """

    sentence = None

    def __init__(self, alphabet: Iterable[str]) -> None:
        self.symbols = sorted(set(alphabet))
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    @property
    def size(self) -> int:
        return len(self.symbols)

    @property
    def start(self) -> str:
        return "\n" if "\n" in self._ids else self.symbols[0]

    def encode(self, text: str) -> NDArray[np.int32]:
        try:
            return np.fromiter(map(self._ids.__getitem__, text), np.int32, len(text))
        except KeyError as error:
            raise UsageError(
                f"the text contains the character {error.args[0]!r} at position {text.index(error.args[0])}, "
                "which the corpus of the run does not"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.symbols[i] for i in ids)

    def unknown(self, text: str) -> str | None:
        return next((character for character in text if character not in self._ids), None)

    def to_json(self) -> str:
        return json.dumps({"characters": "".join(self.symbols)})

    @classmethod
    def load(cls, path: Path) -> "Characters":
        return cls(json.loads(path.read_text(encoding="utf-8"))["characters"])


class Bytes:
    """One token per byte of the UTF-8 text; 256 types.

    >>> Bytes().encode("é").tolist(), Bytes().decode([195, 169])
    ([195, 169], 'é')
    """

    size = 256
    sentence = None
    start = "\n"

    def encode(self, text: str) -> NDArray[np.int32]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def unknown(self, text: str) -> str | None:
        return None

    def to_json(self) -> str:
        return json.dumps({"bytes": self.size})

    @classmethod
    def load(cls, path: Path) -> "Bytes":
        return cls()


class Words:
    """One token per word; words outside the vocabulary are `<unk>`, the end of a line is `<eos>`.

    If lines are read as sentences, each line begins with `<bos>`.

    >>> tokens = Words.train("a b a\\nc\\n", limit=4, eos=True)
    >>> tokens.words, tokens.encode("a b\\nc\\n").tolist()
    (['<unk>', '<eos>', 'a', 'b'], [2, 3, 1, 0, 1])
    """

    def __init__(self, words: Sequence[str], eos: bool, bos: bool = False) -> None:
        self.words = list(words)
        self.eos, self.bos = eos, bos
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def train(cls, text: str, limit: int | None, eos: bool, bos: bool = False) -> "Words":
        """Build the vocabulary of the most frequent words; ties are broken alphabetically.

        Args:
            text: the training split.
            limit: number of types including `<unk>`, `<eos>` and `<bos>`; None takes every word.
            eos: whether the end of a line is a token.
            bos: whether the beginning of a line is a token.
        """
        special = [UNKNOWN, *([END] if eos else []), *([BEGIN] if bos else [])]
        counts = Counter(text.split())
        frequent = sorted(counts.keys() - set(special), key=lambda word: (-counts[word], word))
        return cls((special + frequent)[:limit], eos, bos)

    @property
    def size(self) -> int:
        return len(self.words)

    @property
    def sentence(self) -> tuple[int, int] | None:
        return (self._ids[BEGIN], self._ids[END]) if self.bos else None

    @property
    def start(self) -> str:
        return "\n" if self.eos else self.words[min(1, self.size - 1)]  # after <unk>, the most frequent word

    def _split(self, text: str) -> list[str]:
        if self.bos:
            text = f"{BEGIN} " + text.replace("\n", f" {END} {BEGIN} ")
        elif self.eos:
            text = text.replace("\n", f" {END} ")
        return text.split()

    def encode(self, text: str) -> NDArray[np.int32]:
        unknown = self._ids[UNKNOWN]
        return np.array([self._ids.get(word, unknown) for word in self._split(text)], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        text = " ".join(word for word in (self.words[i] for i in ids) if not (self.bos and word == BEGIN))
        return re.sub(f" ?{END} ?", "\n", text) if self.eos else text

    def unknown(self, text: str) -> str | None:
        return next((word for word in self._split(text) if word not in self._ids), None)

    def to_json(self) -> str:
        return json.dumps({"words": self.words, "eos": self.eos, "bos": self.bos}, ensure_ascii=False)

    @classmethod
    def load(cls, path: Path) -> "Words":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class BytePairs:
    """Byte-level BPE: frequent byte sequences are tokens, and every text can be encoded."""

    sentence = None
    start = "\n"

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        self._model = model

    @classmethod
    def train(cls, text: str, limit: int) -> "BytePairs":
        """Merge the most frequent pairs of types until there are `limit` types, including the 256 bytes."""
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        longest = max(map(len, text.split()), default=0)
        if longest > LONG_WORD:  # the time to find pairs is quadratic in the length of a word
            notify(
                f"the text has {longest:,} characters without white space between them: byte pairs are found within "
                f"segments of {MAX_MERGE} bytes of such text"
            )
            fixed = pre_tokenizers.FixedLength(MAX_MERGE)
            model.pre_tokenizer = pre_tokenizers.Sequence([model.pre_tokenizer, fixed])
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            # No text has more pairs than bytes; tokenizers reserves memory for what it is asked for.
            vocab_size=min(limit, 256 + 4 * len(text)),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(text_parts(text), trainer)
        return cls(model)

    @property
    def size(self) -> int:
        return self._model.get_vocab_size()

    def encode(self, text: str) -> NDArray[np.int32]:
        parts = [np.array(self._model.encode(part).ids, np.int32) for part in text_parts(text)]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def unknown(self, text: str) -> str | None:
        return None

    def to_json(self) -> str:
        return self._model.to_str(pretty=True)

    @classmethod
    def from_json(cls, text: str) -> "BytePairs":
        """The tokenizer whose `to_json` returned the text."""
        return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def load(cls, path: Path) -> "BytePairs":
        return cls.from_json(path.read_text(encoding="utf-8"))


def text_parts(text: str) -> Iterator[str]:
    """Parts of a text of about `PART` characters, split only where no byte pair spans the boundary.

    >>> "".join(text_parts("one two\\n three\\n")) == "one two\\n three\\n"
    True
    """
    start = 0
    while start < len(text):
        boundary = re.compile(r"(?<=\n)(?= \S)|(?<=\S\n)(?=\S)").search(text, start + PART)
        end = boundary.start() if boundary else len(text)
        yield text[start:end]
        start = end


def train(data: Data, splits: dict[str, str]) -> Tokenizer:
    """Fit the tokenizer of a recipe to the training split.

    The alphabet of characters is that of all splits: it holds no statistics, and a split with an unknown character
    would have no perplexity.

    Args:
        data: the kind of tokens and the number of types.
        splits: text by split.
    """
    if data.tokens == "char":
        return Characters("".join(splits.values()))
    if data.tokens == "byte":
        return Bytes()
    if data.tokens == "word":
        return Words.train(splits["train"], data.vocabulary, data.eos, bos=data.batches == "sentences")
    return BytePairs.train(splits["train"], data.vocabulary or BYTE_PAIRS)


def load(data: Data, path: Path) -> Tokenizer:
    """Load a tokenizer from a file that holds its `to_json`.

    Raises:
        UsageError: the file is missing, or not a tokenizer of this kind.
    """
    kinds = {"char": Characters, "byte": Bytes, "word": Words, "bpe": BytePairs}
    try:
        tokenizer: Tokenizer = kinds[data.tokens].load(path)  # type: ignore[attr-defined]
    except Exception as error:  # tokenizers raises Exception itself
        raise UsageError(f"{path} cannot be read as a tokenizer of {data.tokens} tokens: {error}") from error
    return tokenizer
