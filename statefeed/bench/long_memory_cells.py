"""The recurrent layers of the tasks of long memory, by the name of their cell."""

from __future__ import annotations

from collections.abc import Callable

import torch

import statefeed as sf


def _lstm_that_remembers(inputs: int, width: int) -> sf.LSTM:
    """An LSTM whose forget gates begin open, with a bias of 1 (Jozefowicz, Zaremba and Sutskever, 2015)."""
    layer = sf.LSTM(inputs, width)
    with torch.no_grad():
        for name, value in (("bias_ih_l0", 1.0), ("bias_hh_l0", 0.0)):
            layer.get_parameter(name)[width : 2 * width] = value
    return layer


LAYERS: dict[str, Callable[[int, int], sf.FeedbackLayer]] = {
    "rnn": sf.RNN,
    "gru": sf.GRU,
    "lstm": sf.LSTM,
    "lstm-forget-1": _lstm_that_remembers,
}
