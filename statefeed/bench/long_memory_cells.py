"""The recurrent layers of the tasks of long memory, by the name of their cell."""

from __future__ import annotations

from collections.abc import Callable

import statefeed as sf


def _lstm_that_remembers(inputs: int, width: int) -> sf.LSTM:
    """An LSTM whose forget gates begin open, with a bias of 1 (Jozefowicz, Zaremba and Sutskever, 2015)."""
    layer = sf.LSTM(inputs, width)
    for name, value in (("bias_ih_l0", 1.0), ("bias_hh_l0", 0.0)):
        layer.get_parameter(name).data[width : 2 * width] = value
    return layer


# Functions, because a class is imported with torch, and the options are checked without it.
LAYERS: dict[str, Callable[[int, int], sf.FeedbackLayer]] = {
    "rnn": lambda inputs, width: sf.RNN(inputs, width),
    "gru": lambda inputs, width: sf.GRU(inputs, width),
    "lstm": lambda inputs, width: sf.LSTM(inputs, width),
    "lstm-forget-1": _lstm_that_remembers,
}
