"""Cells of ``python -m statefeed.bench.custom``, each written in one piece and split at the input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class LayerNormGRUCell(nn.Module):
    """GRU with layer norm of both products."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.hidden = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm_input = nn.LayerNorm(3 * hidden_size)
        self.norm_hidden = nn.LayerNorm(3 * hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self._next(self.norm_input(self.input(x)), h)

    def _next(self, inputs: Tensor, h: Tensor) -> Tensor:
        x_r, x_z, x_n = inputs.chunk(3, -1)
        h_r, h_z, h_n = self.norm_hidden(self.hidden(h)).chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return (1 - z) * n + z * h


class SplitLayerNormGRUCell(LayerNormGRUCell):
    def project_input(self, x: Tensor) -> Tensor:
        inputs: Tensor = self.norm_input(self.input(x))
        return inputs

    def step(self, inputs: Tensor, h: Tensor) -> Tensor:
        return self._next(inputs, h)


class LightGRUCell(nn.Module):
    """Light GRU (Ravanelli et al., 2018) without a norm: no reset gate, relu candidate."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 2 * hidden_size)
        self.hidden = nn.Linear(hidden_size, 2 * hidden_size, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self._next(self.input(x), h)

    def _next(self, inputs: Tensor, h: Tensor) -> Tensor:
        z, n = (inputs + self.hidden(h)).chunk(2, -1)
        z = torch.sigmoid(z)
        return z * h + (1 - z) * torch.relu(n)


class SplitLightGRUCell(LightGRUCell):
    def project_input(self, x: Tensor) -> Tensor:
        inputs: Tensor = self.input(x)
        return inputs

    def step(self, inputs: Tensor, h: Tensor) -> Tensor:
        return self._next(inputs, h)


class IndRNNCell(nn.Module):
    """h = tanh(W x + b + u * h') (Li et al., 2018), whose Jacobian is diagonal."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, hidden_size)
        self.u = nn.Parameter(torch.rand(hidden_size, device="cpu"))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.u * h)


class SplitIndRNNCell(IndRNNCell):
    diagonal_jacobian = True

    def project_input(self, x: Tensor) -> Tensor:
        inputs: Tensor = self.input(x)
        return inputs

    def step(self, inputs: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(torch.addcmul(inputs, self.u, h))


class WholeGRUCell(nn.GRUCell):
    """torch's GRUCell, called as a whole because it is a subclass."""


class Forms(NamedTuple):
    """A cell in one piece and split; both have the same parameters."""

    whole: type[nn.Module]
    split: type[nn.Module]


CELLS = {
    "layernorm-gru": Forms(LayerNormGRUCell, SplitLayerNormGRUCell),
    "light-gru": Forms(LightGRUCell, SplitLightGRUCell),
    "gru": Forms(WholeGRUCell, nn.GRUCell),
    "indrnn": Forms(IndRNNCell, SplitIndRNNCell),
}
