"""Import path of the layers in version 0.1, for loading whole layers pickled with it."""

from statefeed.layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN"]
