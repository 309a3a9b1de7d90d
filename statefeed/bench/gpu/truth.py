"""Reference for the parity stage: every feedback rule from its equations, in float64 on the CPU, in plain torch.

    delta[t] = e[t] + F[t+1]^T delta[t+1]                   F = diag(D), plus dh/dc of the same step in an LSTM
    delta_k  = scan_F(e + shift((J - F)^T delta_{k-1}))     k corrections

A state s is h, or the concatenation (h, c) for an LSTM. "bptt" is F = J, computed by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

# (inputs (..., I), states before (..., S), weights) -> states after (..., S)
Step = Callable[..., Tensor]


def _rnn(nonlinearity: Callable[[Tensor], Tensor]) -> Step:
    def step(x: Tensor, s: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        return nonlinearity(x @ w_ih.T + b_ih + s @ w_hh.T + b_hh)

    return step


def _gru(x: Tensor, s: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (x @ w_ih.T + b_ih).chunk(3, -1), (s @ w_hh.T + b_hh).chunk(3, -1)
    z = torch.sigmoid(x_z + h_z)
    return (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + z * s


def _lstm(x: Tensor, s: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    h, c = s.chunk(2, -1)
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], -1)


STEPS: dict[str, Step] = {"RNN_TANH": _rnn(torch.tanh), "RNN_RELU": _rnn(torch.relu), "GRU": _gru, "LSTM": _lstm}


class _Rule(torch.autograd.Function):
    """All states (T, B, S) of one layer in one direction; the gradient is the rule's."""

    @staticmethod
    def forward(ctx: Any, mode: str, rule: str, x: Tensor, initial: Tensor, *weights: Tensor) -> Tensor:
        states = [initial]
        for x_t in x:
            states.append(STEPS[mode](x_t, states[-1], *weights))
        ctx.mode, ctx.rule = mode, rule
        ctx.save_for_backward(x, torch.stack(states), *weights)
        return torch.stack(states[1:])

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Any, ...]:
        x, states, *weights = ctx.saved_tensors
        local = vjp(STEPS[ctx.mode], x, states[:-1], *weights)[1]
        diagonal, _, corrections = ctx.rule.partition("+")
        D = _diagonal(ctx.mode, diagonal, x, states, weights, local)
        dh_dc = _dh_dc(x, states, *weights) if ctx.mode == "LSTM" else None

        def fed_back(D: Tensor, dh_dc: Tensor | None, delta: Tensor) -> Tensor:
            """F^T delta; in an LSTM, the gradient of c includes the path through h of the same step."""
            if dh_dc is None:
                return D * delta
            delta_h, delta_c = delta.chunk(2, -1)
            return D * torch.cat([delta_h, delta_c + dh_dc * delta_h], -1)

        def scan(e: Tensor) -> Tensor:
            delta = [e[-1]]
            for t in reversed(range(len(e) - 1)):
                delta.append(e[t] + fed_back(D[t + 1], None if dh_dc is None else dh_dc[t + 1], delta[-1]))
            return torch.stack(delta[::-1])

        delta = scan(e)
        first = fed_back(D[0], None if dh_dc is None else dh_dc[0], delta[0])
        for _ in range(int(corrections or 0)):
            residual = local(delta)[1] - fed_back(D, dh_dc, delta)
            delta = scan(e + torch.cat([residual[1:], torch.zeros_like(e[:1])]))
            first = fed_back(D[0], None if dh_dc is None else dh_dc[0], delta[0]) + residual[0]
        dx, _, *dw = local(delta)
        return None, None, dx, first, *dw


def _diagonal(mode: str, name: str, x: Tensor, states: Tensor, weights: list[Tensor], local: Any) -> Tensor:
    """D, (T, B, S)."""
    before, S = states[:-1], states.shape[-1]
    if name == "dsf":
        return torch.linspace(0, 1, S, dtype=x.dtype, device=x.device).expand_as(before)
    if name == "gate":
        w_ih, w_hh, b_ih, b_hh = weights
        H = w_hh.shape[1]
        gate = torch.sigmoid(x @ w_ih.T + b_ih + before[..., :H] @ w_hh.T + b_hh)[..., H : 2 * H]
        return gate if mode == "GRU" else torch.cat([torch.zeros_like(gate), gate], -1)
    rows = torch.eye(S, dtype=x.dtype, device=x.device)
    jacobian = torch.stack([local(row.expand_as(before))[1][..., i] for i, row in enumerate(rows)], -1)
    return jacobian.mean((0, 1)).expand_as(before) if name == "calibrated" else jacobian


def _dh_dc(x: Tensor, states: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    H = w_hh.shape[1]
    o = torch.sigmoid(x @ w_ih.T + b_ih + states[:-1, :, :H] @ w_hh.T + b_hh)[..., 3 * H :]
    return o * (1 - torch.tanh(states[1:, :, H:]) ** 2)


def outputs(layer: nn.RNNBase, rule: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and final states of a layer of any depth and direction, with the gradient of a rule.

    Args:
        layer: layer with float64 weights and biases.
        rule: "bptt", or a diagonal among "dsf", "gate", "jacobian" and "calibrated" (its first batch), with "+k".
        x: (T, B, I), float64; the initial state is zero.

    Returns:
        y (T, B, H * directions), and the final states (L * directions, B, S).
    """
    directions = 2 if layer.bidirectional else 1
    final, width = [], layer.hidden_size
    initial = x.new_zeros(x.shape[1], width * (2 if layer.mode == "LSTM" else 1))
    for index in range(layer.num_layers):
        y = []
        for side in range(directions):
            weights = layer.all_weights[index * directions + side]
            source = x.flip(0) if side else x
            if rule == "bptt":
                steps = [initial]
                for x_t in source:
                    steps.append(STEPS[layer.mode](x_t, steps[-1], *weights))
                states = torch.stack(steps[1:])
            else:
                states = _Rule.apply(layer.mode, rule, source, initial, *weights)  # type: ignore[no-untyped-call]
            final.append(states[-1])
            y.append((states.flip(0) if side else states)[..., :width])
        x = torch.cat(y, -1)
    return x, torch.stack(final)
