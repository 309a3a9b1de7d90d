"""The text of ``statefeed bench training``: Penn Treebank, or made-up text of the same lengths and frequencies."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

from statefeed.bench.options import OptionError, TrainingOptions
from statefeed.bench.training_contenders import Recipe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from statefeed.lm.data.batches import Source

# Quantiles (steps of 1/20) of the sentence length in Penn Treebank, and its numbers of words and sentences.
_LENGTHS = (1, 6, 9, 11, 12, 14, 15, 16, 18, 19, 20, 22, 23, 24, 26, 27, 29, 31, 34, 39, 82)
WORDS, SENTENCES = 9_999, 42_068
BYTE_PAIRS, _STEPS_OF_BLOCKS = 16_000, 16


def load_text(options: TrainingOptions, recipe: Recipe) -> tuple[Source, int, dict[str, Any]]:
    """The training text in batches, the size of its vocabulary, and the description for the records."""
    from statefeed.lm import config
    from statefeed.lm.data import batches, corpora, tokens
    from statefeed.lm.errors import UsageError

    train = config.Train(batch=recipe.batch, context=recipe.context)
    if recipe.batches == "blocks":
        types = 257 if options.smoke else BYTE_PAIRS
        ids = _byte_pairs(types, _STEPS_OF_BLOCKS * recipe.batch * recipe.context)
        corpus = "made-up byte pairs"
        return (
            batches.training(ids, config.Data(batches="blocks"), train),
            types,
            {"corpus": corpus, "vocabulary": types},
        )
    if options.data is None:
        data = config.Data(tokens="word", batches="sentences")
        text = made_up(200, 50) if options.smoke else made_up(SENTENCES, WORDS)
        corpus = "made-up sentences with the lengths of Penn Treebank and as many words"
    else:
        try:
            data = config.Data(corpus="ptb", path=options.data, tokens="word", batches="sentences")
            text = corpora.read(data).splits["train"]
        except UsageError as error:
            raise OptionError(str(error)) from None
        corpus = "the training split in --data"
    tokenizer = tokens.train(data, {"train": text})
    ids = tokenizer.encode(text)
    return batches.training(ids, data, train), tokenizer.size, {"corpus": corpus, "vocabulary": tokenizer.size}


def _byte_pairs(types: int, count: int) -> NDArray[np.int32]:
    """Random ids that follow Zipf's law."""
    import numpy as np

    weights = 1 / (np.arange(types) + 2.7)
    return np.random.default_rng(0).choice(types, count, p=weights / weights.sum()).astype(np.int32)


def made_up(sentences: int, words: int) -> str:
    """Synthetic sentences with the lengths of Penn Treebank and words that follow Zipf's law; each word occurs.

    Args:
        sentences: number of sentences.
        words: number of different words; each occurs once at the beginning of the text.

    Example:
        >>> len(made_up(5, 3).splitlines())
        5
    """
    generator = random.Random(0)
    steps = len(_LENGTHS) - 1
    lengths = []
    for _ in range(sentences):
        place = generator.random() * steps
        low, high = _LENGTHS[int(place)], _LENGTHS[int(place) + 1]
        lengths.append(round(low + (place - int(place)) * (high - low)))
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(words)))
    drawn = generator.choices(range(words), cum_weights=weights, k=max(0, sum(lengths) - words))
    order = itertools.chain(range(words), drawn)
    return "".join(" ".join(f"w{k}" for k in itertools.islice(order, length)) + "\n" for length in lengths)
