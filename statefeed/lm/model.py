"""Owns the language model: embedding, L blocks around one recurrent layer each, head; time first, (T, B, H)."""

import math
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

import statefeed as sf
from statefeed.lm import config
from statefeed.lm.config import UsageError

State: TypeAlias = Tensor | tuple[Tensor, Tensor]

_CELLS = {"rnn": sf.RNN, "gru": sf.GRU, "lstm": sf.LSTM}


class PlainBlock(nn.Module):
    """x + rnn(x)."""

    def __init__(self, recipe: config.Model) -> None:
        super().__init__()
        self.rnn = _CELLS[recipe.cell](recipe.width, recipe.width, feedback=recipe.feedback)
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        y, state = self.rnn(x, state)
        return x + self.dropout(y), state


class PreNormBlock(nn.Module):
    """x + linear(rnn(norm(x))), then x + mlp(norm(x)) with a GELU layer four times as wide."""

    def __init__(self, recipe: config.Model) -> None:
        super().__init__()
        width = recipe.width
        self.rnn_norm = nn.LayerNorm(width)
        self.rnn = _CELLS[recipe.cell](width, width, feedback=recipe.feedback)
        self.linear = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        y, state = self.rnn(self.rnn_norm(x), state)
        x = x + self.dropout(self.linear(y))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.mlp_norm(x))))), state


class LanguageModel(nn.Module):
    """Next-token logits and the state to go on from.

    Weights are N(0, 0.02), biases zero; output projections of the L pre-norm blocks are divided by the square root of
    their 2 L sub-layers; norms are at one; recurrent cells keep torch's initialisation. The keys of `state_dict` are
    those of the same model made of `torch.nn` layers.

    Args:
        recipe: the model section of a recipe.
        vocabulary: V, the number of types.

    Raises:
        UsageError: when the feedback rule does not exist or does not fit the cell.
    """

    def __init__(self, recipe: config.Model, vocabulary: int) -> None:
        super().__init__()
        block = PreNormBlock if recipe.block == "prenorm" else PlainBlock
        self.embedding = nn.Embedding(vocabulary, recipe.width)
        self.dropout = nn.Dropout(recipe.dropout)
        try:
            self.blocks = nn.ModuleList([block(recipe) for _ in range(recipe.layers)])
        except ValueError as error:
            raise UsageError(f"model.feedback={recipe.feedback}: {error}") from error
        self.norm = nn.LayerNorm(recipe.width) if recipe.block == "prenorm" else nn.Identity()
        self.head = nn.Linear(recipe.width, vocabulary)
        self.apply(_initialise)
        for module in self.blocks:
            if isinstance(module, PreNormBlock):
                for projection in (module.linear, module.narrow):
                    projection.weight.data /= math.sqrt(2 * recipe.layers)

    def forward(self, tokens: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Read tokens.

        Args:
            tokens: ids, (T, B).
            states: one per block, as returned by the call on the text before; None at the beginning of a text.

        Returns:
            Logits (T, B, V) and the states after the last token.
        """
        x = self.dropout(self.embedding(tokens))
        after = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i])
            after.append(state)
        return self.head(self.norm(x)), after

    def loss(self, tokens: Tensor, targets: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Mean cross-entropy in nats over the targets that count, and the states; here alone logits meet targets.

        Args:
            tokens: ids, (T, B).
            targets: ids, (T, B); `batches.IGNORED` marks those that do not count.
            states: as for `forward`.
        """
        logits, states = self(tokens, states)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), states


def detached(states: list[State]) -> list[State]:
    """The same states, through which no gradient flows."""
    return [s.detach() if isinstance(s, Tensor) else (s[0].detach(), s[1].detach()) for s in states]


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) for embeddings and linear layers; norms and recurrent cells stay as torch makes them."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
