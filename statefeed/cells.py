"""Each cell's step, its local gradient, its direct path and the diagonal of its Jacobian, side by side; no time axis.

Rows stand for (t, b) pairs: every function is element-wise over rows of shape (..., H). Weights are torch's, gates in
torch's order (r z n; i f g o). A tensor named d_input or d_hidden is the gradient at the pre-activations that x W_ih^T
+ b_ih and h W_hh^T + b_hh enter; they are one and the same but for the GRU's candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Products: TypeAlias = Callable[[], tuple[Tensor, Tensor]]
Integrate: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Cell(NamedTuple):
    """What recurrence.py needs of a cell; its state is (h,), or (h, c) where ``emit`` is given.

    Attributes:
        name: torch's name of the layer's forward function.
        step: (h, products, integrate) -> what the other functions need. ``products()`` gives x W_ih^T + b_ih and
            h' W_hh^T + b_hh; ``integrate(u, f)`` gives c' and c of c = f c' + u, the one place where time comes in.
        local: (step, h', gradients of the state) -> (d_input, d_hidden).
        direct: step -> the diagonal part of the Jacobian that passes no weight, per state; None is zero.
        jacobian: (step, h', W_hh) -> the diagonal of the Jacobian, per state.
        emit: (step, gradient of h) -> the gradient that reaches c of the same step through h.
    """

    name: str
    step: Callable[[Tensor, Products, Integrate], NamedTuple]
    local: Callable[[Any, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]
    direct: Callable[[Any], tuple[Tensor | None, ...]]
    jacobian: Callable[[Any, Tensor, Tensor], tuple[Tensor, ...]]
    emit: Callable[[Any, Tensor], Tensor] | None = None


def _own_weight(w_hh: Tensor, gate: int) -> Tensor:
    """diag of one gate's recurrent matrix, (H,): the weight from a unit to itself."""
    H = w_hh.shape[1]
    return w_hh[gate * H : (gate + 1) * H].diagonal()


# RNN: h = act(a), a = x W_ih^T + b_ih + h' W_hh^T + b_hh


class RNNStep(NamedTuple):
    slope: Tensor  # act'(a)


def _tanh_step(h: Tensor, _products: Products, _integrate: Integrate) -> RNNStep:
    return RNNStep(1 - h * h)


def _relu_step(h: Tensor, _products: Products, _integrate: Integrate) -> RNNStep:
    return RNNStep((h > 0).to(h.dtype))


def _rnn_local(step: RNNStep, _h_before: Tensor, delta: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    d = delta[0] * step.slope
    return d, d


def _rnn_direct(_: RNNStep) -> tuple[None]:
    return (None,)


def _rnn_jacobian(step: RNNStep, _h_before: Tensor, w_hh: Tensor) -> tuple[Tensor, ...]:
    return (step.slope * _own_weight(w_hh, 0),)


# GRU: h = (1 - z) n + z h', n = tanh(x_n + r q), q = h' W_hn^T + b_hn


class GRUStep(NamedTuple):
    r: Tensor
    z: Tensor
    n: Tensor
    q: Tensor


def _gru_step(_h: Tensor, products: Products, _integrate: Integrate) -> GRUStep:
    input, hidden = products()
    x_r, x_z, x_n = input.chunk(3, -1)
    h_r, h_z, q = hidden.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return GRUStep(r, z, torch.tanh(x_n + r * q), q)


def _gru_local(step: GRUStep, h_before: Tensor, delta: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    r, z, n, q = step
    d_n = delta[0] * (1 - z) * (1 - n * n)
    d_z = delta[0] * (h_before - n) * z * (1 - z)
    d_r = d_n * q * r * (1 - r)
    return torch.cat([d_r, d_z, d_n], -1), torch.cat([d_r, d_z, d_n * r], -1)


def _gru_direct(step: GRUStep) -> tuple[Tensor]:
    return (step.z,)


def _gru_jacobian(step: GRUStep, h_before: Tensor, w_hh: Tensor) -> tuple[Tensor, ...]:
    r, z, n, q = step
    w_r, w_z, w_n = (_own_weight(w_hh, gate) for gate in range(3))
    through_z = (h_before - n) * z * (1 - z) * w_z
    through_n = (1 - z) * (1 - n * n) * (r * w_n + q * r * (1 - r) * w_r)
    return (z + through_z + through_n,)


# LSTM: c = f c' + i g, h = o tanh(c)


class LSTMStep(NamedTuple):
    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c_before: Tensor
    tanh_c: Tensor


def _lstm_step(_h: Tensor, products: Products, integrate: Integrate) -> LSTMStep:
    input, hidden = products()
    i, f, g, o = (input + hidden).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c_before, c = integrate(i * g, f)
    return LSTMStep(i, f, g, o, c_before, torch.tanh(c))


def _lstm_local(step: LSTMStep, _h_before: Tensor, delta: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    i, f, g, o, c_before, tanh_c = step
    d_h, gamma = delta
    d_i = gamma * g * i * (1 - i)
    d_f = gamma * c_before * f * (1 - f)
    d_g = gamma * i * (1 - g * g)
    d_o = d_h * tanh_c * o * (1 - o)
    d = torch.cat([d_i, d_f, d_g, d_o], -1)
    return d, d


def _lstm_emit(step: LSTMStep, d_h: Tensor) -> Tensor:
    """The gradient that reaches c[t] through h[t] of the same step."""
    return step.o * (1 - step.tanh_c * step.tanh_c) * d_h


def _lstm_direct(step: LSTMStep) -> tuple[None, Tensor]:
    return None, step.f


def _lstm_jacobian(step: LSTMStep, _h_before: Tensor, w_hh: Tensor) -> tuple[Tensor, ...]:
    """D_c = f, and D_h = diag(dh[t] / dh[t-1]) at fixed c[t-1]."""
    i, f, g, o, c_before, tanh_c = step
    w_i, w_f, w_g, w_o = (_own_weight(w_hh, gate) for gate in range(4))
    through_c = g * i * (1 - i) * w_i + c_before * f * (1 - f) * w_f + i * (1 - g * g) * w_g
    return tanh_c * o * (1 - o) * w_o + o * (1 - tanh_c * tanh_c) * through_c, f


RNN_TANH = Cell("rnn_tanh", _tanh_step, _rnn_local, _rnn_direct, _rnn_jacobian)
RNN_RELU = Cell("rnn_relu", _relu_step, _rnn_local, _rnn_direct, _rnn_jacobian)
GRU = Cell("gru", _gru_step, _gru_local, _gru_direct, _gru_jacobian)
LSTM = Cell("lstm", _lstm_step, _lstm_local, _lstm_direct, _lstm_jacobian, _lstm_emit)
