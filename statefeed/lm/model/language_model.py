"""The language model: embedding, L blocks with one sequence layer each, head; time first, (T, B, H).

In a padded batch, recurrent layers and everything between them process packed rows (N, H), without padding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from statefeed.lm import config
from statefeed.lm.data.batches import IGNORED, Batch, to_device
from statefeed.lm.errors import UsageError
from statefeed.lm.model import head
from statefeed.lm.model.blocks import BLOCKS, State


class Loss(NamedTuple):
    """The loss of one batch.

    Args:
        sum: differentiable scalar, the cross-entropy in nats summed over all targets that are not `IGNORED`.
        tokens: number of these targets.
        states: one per block, after the last token.
    """

    sum: Tensor
    tokens: int
    states: list[State]

    @property
    def mean(self) -> Tensor:
        """Nats per token."""
        return self.sum / self.tokens


class LanguageModel(nn.Module):
    """Language model that returns next-token logits and the states for the next call.

    Weights are initialized from N(0, 0.02), biases with zero. The output projections of the L pre-norm blocks are
    divided by the square root of 2 L, their number of sub-layers. Norms and sequence layers use their own
    initialization. `model.uniform` replaces all of this. The keys of `state_dict` are those of the same model with
    `torch.nn` layers, where torch has the layer.

    Args:
        recipe: the model section of a recipe.
        vocabulary: V, the number of types.

    Raises:
        UsageError: the feedback rule does not exist or does not support the cell.
    """

    def __init__(self, recipe: config.Model, vocabulary: int) -> None:
        super().__init__()
        block = BLOCKS[recipe.block]
        self._packs = recipe.cell in config.RECURRENT
        self.embedding = nn.Embedding(vocabulary, recipe.width)
        self.dropout = nn.Dropout(recipe.dropout)
        try:
            blocks = [block(recipe) for _ in range(recipe.layers)]
        except ValueError as error:
            raise UsageError(f"{recipe.rule_keys}: {error}") from error
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(recipe.width) if block.prenorm else nn.Identity()
        self.head = nn.Linear(recipe.width, vocabulary)
        if recipe.uniform is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -recipe.uniform, recipe.uniform)
        else:
            for module in (self.embedding, *(part for block in blocks for part in block.children()), self.head):
                _initialize(module)
            for projection in (part for block in blocks for part in block.residual_projections()):
                projection.weight.data /= math.sqrt(2 * recipe.layers)

    def forward(self, tokens: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Compute logits for a segment of text.

        Args:
            tokens: ids, (T, B).
            states: one per block, as returned by the call on the previous segment; None at the beginning of a text.

        Returns:
            Logits (T, B, V) and the states after the last token.
        """
        x, states = self._read(tokens, states, None)
        return self.head(x), states

    def loss(self, batch: Batch, states: list[State] | None = None) -> Loss:
        """The cross-entropy of a batch; the head runs on rows whose target is not `IGNORED` only.

        Args:
            batch: on the CPU, where these rows are selected, so that no step synchronizes with a GPU.
            states: as for `forward`; not used if the batch has `is_start`.
        """
        inputs, targets, packing = batch.inputs, batch.targets, None
        device = self.head.weight.device
        if batch.lengths is not None and self._packs:
            packing = _packed_to(pack_padded_sequence(inputs, batch.lengths, enforce_sorted=False), device)
            inputs, targets = packing.data, pack_padded_sequence(targets, batch.lengths, enforce_sorted=False).data
        targets = targets.flatten()
        counted = (targets != IGNORED).nonzero().squeeze(1)
        x, states = self._read(to_device(inputs, device), None if batch.is_start else states, packing)
        rows = x.flatten(0, -2)
        if len(counted) < len(targets):
            rows, targets = rows.index_select(0, to_device(counted, device)), targets.index_select(0, counted)
        loss = head.cross_entropy_sum(rows, self.head.weight, self.head.bias, to_device(targets, device))
        return Loss(loss, len(counted), states)

    def _read(
        self, tokens: Tensor, states: list[State] | None, packing: PackedSequence | None
    ) -> tuple[Tensor, list[State]]:
        """The input of the head, (T, B, H) or packed rows, and the states after the last token."""
        x = self.dropout(self.embedding(tokens))
        after = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i], packing)
            after.append(state)
        return self.norm(x), after


def _packed_to(packing: PackedSequence, device: torch.device) -> PackedSequence:
    """Move a PackedSequence by asynchronous copies; its own `to` copies from memory that is not pinned, and waits."""
    data, batch_sizes, *order = packing
    return PackedSequence(
        to_device(data, device), batch_sizes, *(None if part is None else to_device(part, device) for part in order)
    )


def detach_states(states: list[State], keep_mask: Tensor) -> list[State]:
    """The initial states of the next step: detached, and zero for some columns.

    A model that sees a zero state only once per epoch performs poorly at the beginning of a text.

    Args:
        states: after the previous step, (1, B, H) each.
        keep_mask: bool (B, 1), false for columns whose state is set to zero.
    """
    return [
        s.detach() * keep_mask if isinstance(s, Tensor) else tuple(part.detach() * keep_mask for part in s)
        for s in states
    ]


def _initialize(module: nn.Module) -> None:
    """Initialize an embedding or linear layer from N(0, 0.02); other modules are left unchanged."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
