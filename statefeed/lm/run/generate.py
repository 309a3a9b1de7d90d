"""Sampling: one token after the other from the state of the last, so that each costs the same."""

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
    """Sample tokens without end.

    Args:
        model: in evaluation mode, on any device; tokens are drawn on the CPU.
        prompt: ids that are read first; at least one.
        temperature: logits are divided by it; lower: more deterministic; higher: more diverse.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the fewest likeliest tokens that together have this probability.
        seed: the same seed gives the same tokens.
        sentence: the ids that begin and end a sentence, where the model knows no text before a sentence: it reads the
            last sentence of the prompt only, and starts from an empty state after each end.

    Yields:
        One id after the other; however many came before, each costs O(1), under attention O(window).
    """
    generator, device = torch.Generator().manual_seed(seed), model.head.weight.device
    begin, end = sentence or (-1, -1)
    if begin in prompt:
        prompt = prompt[len(prompt) - 1 - list(reversed(prompt)).index(begin) :]
    logits, states = model(torch.tensor(prompt, device=device).unsqueeze(1))
    while True:
        probabilities = _distribution(_scale(logits[-1, 0].cpu(), temperature), top_k, top_p)
        token = torch.multinomial(probabilities, 1, generator=generator)
        yield int(token)
        if int(token) == end:
            logits, states = model(torch.tensor([[begin]], device=device))
        else:
            logits, states = model(token.unsqueeze(1).to(device), states)


def _scale(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature; in its limit, where that is no number, those of the likeliest token alone."""
    scaled = logits / temperature
    if bool(scaled.isfinite().all()):
        return scaled
    return torch.zeros_like(logits).masked_fill(logits < logits.max(), -torch.inf)


def _distribution(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities (V,) of the tokens that top-k and top-p leave."""
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(0)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= top_p
        beyond[0] = False  # whatever top_p is in float32
        probabilities = probabilities.index_fill(0, order[beyond], 0.0)
    return probabilities
