"""Blocks of the language model: a sequence layer and what is around it; x is (T, B, H), or (N, H) for packed rows."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import statefeed as sf
from statefeed.lm import config
from statefeed.lm.data.batches import to_device
from statefeed.lm.model import baselines

State: TypeAlias = Any  # the state of one block: a tensor or a tuple of tensors, each (., B, .)


def recurrent(kind: Callable[..., sf.FeedbackLayer], recipe: config.Model, inputs: int, **options: int) -> nn.Module:
    """A recurrent layer with the width, the rule at the start of training and the forward method of a recipe."""
    rule = sf.Schedule(recipe.feedback).at(0.0)
    layer = kind(inputs, recipe.width, feedback=rule, **options)
    layer.forward_method = recipe.forward
    return layer


# The sequence layer of every model.cell, made from the model section of a recipe and I. It maps (x (T, B, I), state) to
# (y (T, B, H), state). Recurrent layers accept packed x and any I, the others only I = H.
LAYERS: dict[str, Callable[[config.Model, int], nn.Module]] = {
    "rnn": lambda recipe, inputs: recurrent(sf.RNN, recipe, inputs),
    "gru": lambda recipe, inputs: recurrent(sf.GRU, recipe, inputs),
    "lstm": lambda recipe, inputs: recurrent(sf.LSTM, recipe, inputs),
    "slstm": lambda recipe, inputs: recurrent(sf.SLSTM, recipe, inputs, num_heads=recipe.heads),
    "transformer": lambda recipe, _: baselines.Attention(recipe.width, recipe.heads, recipe.window),
    "s4d": lambda recipe, _: baselines.S4D(recipe.width, recipe.modes),
    "mingru": lambda recipe, _: baselines.MinGRU(recipe.width),
}


def _through(layer: nn.Module, x: Tensor, state: State, packing: PackedSequence | None) -> tuple[Tensor, State]:
    """Run a layer on x, (T, B, H) or packed rows; returns outputs in the shape of x, and the final states."""
    if packing is None:
        y, state = layer(x, state)
        return y, state
    packed, state = layer(packing._replace(data=x), state)
    return packed.data, state


class Block(nn.Module):
    """Base of all blocks: (x, state, packing) to outputs in the shape of x, and the state after the last token.

    Attributes:
        prenorm: whether the block normalizes its input, so that the head needs a norm too.
    """

    prenorm: ClassVar[bool] = False

    def residual_projections(self) -> tuple[nn.Linear, ...]:
        """The linear layers whose outputs are added to the residual path."""
        return ()


class StackedBlock(Block):
    """Block without a residual path: rnn(x)."""

    def __init__(self, recipe: config.Model) -> None:
        super().__init__()
        self.rnn = LAYERS[recipe.cell](recipe, recipe.width)
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, state: State, packing: PackedSequence | None) -> tuple[Tensor, State]:
        y, state = _through(self.rnn, x, state, packing)
        return self.dropout(y), state


class PlainBlock(StackedBlock):
    """Block with a residual path: x + rnn(x)."""

    def forward(self, x: Tensor, state: State, packing: PackedSequence | None) -> tuple[Tensor, State]:
        y, state = super().forward(x, state, packing)
        return x + y, state


class PreNormBlock(Block):
    """Pre-norm block: x + linear(rnn(norm(x))), then x + mlp(norm(x)) with 4 H hidden GELU units."""

    prenorm = True

    def __init__(self, recipe: config.Model) -> None:
        super().__init__()
        width = recipe.width
        self.rnn_norm = nn.LayerNorm(width)
        self.rnn = LAYERS[recipe.cell](recipe, recipe.width)
        self.linear = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)  # the names of both are keys of saved weights
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, state: State, packing: PackedSequence | None) -> tuple[Tensor, State]:
        y, state = _through(self.rnn, self.rnn_norm(x), state, packing)
        x = x + self.dropout(self.linear(y))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.mlp_norm(x))))), state

    def residual_projections(self) -> tuple[nn.Linear, ...]:
        return self.linear, self.narrow


class CausalConvolution(nn.Module):
    """Depthwise causal convolution over time: ``y[t] = bias + sum_k weight[:, 0, k] x[t - K + 1 + k]``.

    Args:
        width: H.
        kernel: K, number of steps; the state is the last K - 1 inputs, (K - 1, B, H), zero at the beginning of a text.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(width, 1, kernel, device="cpu").uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width, device="cpu").uniform_(-bound, bound))

    def forward(self, x: Tensor, state: Tensor | None, packing: PackedSequence | None) -> tuple[Tensor, Tensor]:
        """Outputs in the shape of x, (T, B, H) or packed rows, and the state after the last token of each column."""
        lengths = None
        if packing is not None:  # padding follows a sequence, so that no output of its own depends on it
            x, lengths = pad_packed_sequence(packing._replace(data=x))
        (T, B, H), kernel = x.shape, self.weight.shape[-1]
        inputs = torch.cat([x.new_zeros(kernel - 1, B, H) if state is None else state, x])
        y: Tensor = self.bias
        for k in range(kernel):
            y = torch.addcmul(y, inputs[k : k + T], self.weight[:, 0, k])
        if lengths is None:
            return y, inputs[T:]
        last = to_device(lengths + torch.arange(kernel - 1, device="cpu").unsqueeze(1), x.device)
        after = inputs[last, torch.arange(B, device=x.device)]
        # Equal lengths are sorted equally, so that the rows have the order of those of the given packing.
        return pack_padded_sequence(y, lengths, enforce_sorted=False).data, after


class XLSTMBlock(Block):
    """Block of an sLSTM in xLSTM: x + group_norm(slstm(norm(x))), then x + gated_mlp(norm(x)).

    The sLSTM reads ``silu(convolution(norm(x)))`` and ``norm(x)``, concatenated. The group norm has one group per head.
    The MLP is ``down(gelu(a) * b)`` with ``a, b = up(norm(x))`` and 4/3 H hidden units, rounded up to a multiple of 8
    (Beck et al., xLSTM, arXiv 2405.04517).

    The block of the xlstm package is a special case. There the gates i and f read the convolution only, z and o the
    plain input only, each through one matrix per head: the other entries of the (4H, 2H) input weights are zero. Its
    norms, input weights and MLP have no biases, and its MLP is rounded up to a multiple of 64.

    The state is that of the layer, (h, c, n, m), after that of the convolution if there is one.
    """

    prenorm = True

    def __init__(self, recipe: config.Model) -> None:
        super().__init__()
        width = recipe.width
        hidden = 8 * math.ceil(width / 6)
        self.rnn_norm = nn.LayerNorm(width)
        self.convolution = CausalConvolution(width, recipe.convolution) if recipe.convolution else None
        self.rnn = LAYERS[recipe.cell](recipe, 2 * width if recipe.convolution else width)
        self.head_norm = nn.GroupNorm(recipe.heads, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, state: State, packing: PackedSequence | None) -> tuple[Tensor, State]:
        inputs, last = self.rnn_norm(x), []
        if self.convolution is not None:
            first, state = (None, None) if state is None else (state[0], state[1:])
            convolved, inputs_after = self.convolution(inputs, first, packing)
            inputs, last = torch.cat([F.silu(convolved), inputs], -1), [inputs_after]
        y, after = _through(self.rnn, inputs, state, packing)
        x = x + self.dropout(self.head_norm(y.flatten(0, -2)).view_as(y))
        a, b = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.gelu(a) * b)), (*last, *after)

    def residual_projections(self) -> tuple[nn.Linear, ...]:
        return (self.down,)


BLOCKS: dict[str, type[Block]] = {
    "plain": PlainBlock,
    "prenorm": PreNormBlock,
    "stacked": StackedBlock,
    "xlstm": XLSTMBlock,
}
