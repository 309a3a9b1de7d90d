"""Names of version 0.1 under which whole layers were pickled, so that such files load."""

from statefeed.layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN"]
