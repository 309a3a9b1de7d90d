"""Table of recurrent cells, with one file per cell."""

from __future__ import annotations

from statefeed.cells.check import check_cell
from statefeed.cells.gru import GRU
from statefeed.cells.lstm import LSTM
from statefeed.cells.lstm_projected import LSTMProjected
from statefeed.cells.protocol import Cell, State, Step
from statefeed.cells.rnn import RNNRelu, RNNTanh
from statefeed.cells.slstm import SLSTM, SLSTMExp

CELLS: dict[str, Cell] = {
    cell.name: cell for cell in (GRU(), LSTM(), LSTMProjected(), RNNTanh(), RNNRelu(), SLSTM(), SLSTMExp())
}

__all__ = ["CELLS", "Cell", "State", "Step", "check_cell"]
