"""LSTM with a projected output: u = o tanh(c), h = u W_hr^T. Gates in torch's order i, f, g, o."""

from __future__ import annotations

import triton
import triton.language as tl

from statefeed.backends.triton.cells.activations import sigmoid, tanh
from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.cells.lstm import factors, local


@triton.jit
def output(gates, saved, row, unit, H, mask, ACC: tl.constexpr):
    """u of one row: ``gates`` (N, 4H) pre-activations, ``saved`` (N, H) c before the step."""
    gate = gates + row * (4 * H) + unit
    i = sigmoid(tl.load(gate, mask, 0).to(ACC))
    f = sigmoid(tl.load(gate + H, mask, 0).to(ACC))
    g = tanh(tl.load(gate + 2 * H, mask, 0).to(ACC))
    o = sigmoid(tl.load(gate + 3 * H, mask, 0).to(ACC))
    return o * tanh(f * tl.load(saved + row * H + unit, mask, 0).to(ACC) + i * g)


LSTM_PROJECTED = Cell("lstm_projected", 2, 4, 4, factors, local, "cell_state", output)
