"""Evaluation of a model on a split: perplexity and bits per byte, and when it is due."""

import math
import time
from dataclasses import dataclass

import torch

import statefeed as sf
from statefeed.lm.data.batches import Source
from statefeed.lm.errors import require
from statefeed.lm.model import LanguageModel
from statefeed.lm.run.distributed import Group, shard_batch


@dataclass(frozen=True)
class Score:
    """The score of a model on a split.

    Args:
        loss: nats per token.
        tokens: number of predicted tokens.
        tokens_per_byte: tokens of the split divided by bytes of its text.
        seconds: duration of the evaluation.
    """

    loss: float
    tokens: int
    tokens_per_byte: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text, which is comparable between tokenizers.

        If words are replaced by `<unk>`, this is the loss of the text with `<unk>`, which underestimates.
        """
        return self.loss / math.log(2) * self.tokens_per_byte

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.3f} bits per byte"
        )


def perplexity(loss: float) -> float:
    """exp(loss); infinity if it overflows.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def is_scored(step: int, steps: int, evaluations: int) -> bool:
    """Whether the validation split is scored after a step: after ``steps * k // evaluations`` for k = 1, 2, ...

    >>> [step for step in range(1, 11) if is_scored(step, 10, 3)]
    [3, 6, 10]
    """
    k = -(-step * evaluations // steps)  # the first one that is not before this step
    return evaluations >= steps or steps * k // evaluations == step


@torch.no_grad()
def score(model: LanguageModel, source: Source, size: int, group: Group | None = None) -> Score:
    """Evaluate a model on a split.

    Args:
        model: in any mode; its mode is restored.
        source: batches of `batches.scoring`.
        size: size of the split's text in bytes.
        group: the processes that compute the score together; None for this process alone.

    Returns:
        The score, the same in all processes.

    Raises:
        UsageError: the split has no target.
        PeerLost: another process has ended.
    """
    group = group or Group()
    require(len(source) > 0, "a split must have at least 2 tokens to be scored", source.tokens)
    started = time.perf_counter()
    training = model.training
    model.eval()
    total, count, states = torch.zeros((), dtype=torch.float64, device="cpu"), 0, None
    for batch in source.epoch(0):
        (part,) = group.columns(batch.inputs.shape[1], 1)
        if group.has_shard(part):
            with group.guard_collectives():
                nats, counted, states = model.loss(shard_batch(batch, part), states)
            total, count = total.to(nats.device) + nats, count + counted
    model.train(training)
    loss, tokens = group.all_reduce_sum(float(total), float(count))
    return Score(loss / tokens, int(tokens), source.tokens / size, time.perf_counter() - started)


def newton_iterations(model: LanguageModel) -> dict[str, int]:
    """Iterations of the forward pass in parallel over time in the last call, by layer; empty if it is sequential."""
    layers = [module for module in model.modules() if isinstance(module, sf.FeedbackLayer)]
    return {f"newton_iterations_{k}": n for k, layer in enumerate(layers) for n in layer.newton_iterations}
