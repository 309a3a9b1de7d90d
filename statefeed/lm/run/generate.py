"""Sampling of text, one token at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from statefeed.lm.model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1,
    sentence: tuple[int, int] | None = None,
) -> Iterator[int]:
    """Sample an endless sequence of tokens.

    Args:
        model: in evaluation mode, on any device; tokens are drawn on the CPU.
        prompt: ids of the prompt; at least one.
        temperature: divisor of the logits; lower: more deterministic; higher: more diverse.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of most likely tokens with at least this total probability.
        seed: seed of the random generator.
        sentence: ids that begin and end a sentence, for a model trained on separate sentences: it reads only the last
            sentence of the prompt, and starts from a zero state after the end of a sentence.

    Yields:
        Ids, each at a cost of O(1), or O(window) under attention.
    """
    generator, device = torch.Generator().manual_seed(seed), model.head.weight.device
    begin, end = sentence or (-1, -1)
    if begin in prompt:
        prompt = prompt[len(prompt) - 1 - list(reversed(prompt)).index(begin) :]
    logits, states = model(torch.tensor(prompt, device=device).unsqueeze(1))
    while True:
        probabilities = _distribution(scale_logits(logits[-1, 0].cpu(), temperature), top_k, top_p)
        token = torch.multinomial(probabilities, 1, generator=generator)
        yield int(token)
        if int(token) == end:
            logits, states = model(torch.tensor([[begin]], device=device))
        else:
            logits, states = model(token.unsqueeze(1).to(device), states)


def scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature; if they overflow, only the most likely token has a finite logit."""
    scaled = logits / temperature
    if bool(scaled.isfinite().all()):
        return scaled
    return torch.zeros_like(logits).masked_fill(logits < logits.max(), -torch.inf)


def _distribution(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities (V,) after top-k and top-p filtering."""
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(0)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        excluded = ordered.cumsum(0) - ordered >= top_p
        excluded[0] = False  # whatever top_p is in float32
        probabilities = probabilities.index_fill(0, order[excluded], 0.0)
    return probabilities
