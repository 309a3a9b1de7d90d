"""Table of the cells that the Triton kernels support, by the name of the Python cell."""

from __future__ import annotations

from statefeed.backends.triton.cells.cell import Cell
from statefeed.backends.triton.cells.gru import GRU
from statefeed.backends.triton.cells.lstm import LSTM
from statefeed.backends.triton.cells.lstm_projected import LSTM_PROJECTED
from statefeed.backends.triton.cells.rnn import RNN_RELU, RNN_TANH
from statefeed.backends.triton.cells.slstm import SLSTM, SLSTM_EXP

CELLS: dict[str, Cell] = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, GRU, LSTM, LSTM_PROJECTED, SLSTM, SLSTM_EXP)}
