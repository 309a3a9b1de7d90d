"""Reference for the parity stage: every feedback rule from its equations, in float64 on the CPU, in plain torch.

    delta[t] = e[t] + F[t+1]^T delta[t+1]                   F = diag(D), plus dh/dc and dh/dn of the same step
    delta_k  = scan_F(e + shift((J - F)^T delta_{k-1}))     k corrections

A state s is h, or the concatenation (h, c) for an LSTM, h of width P with ``proj_size``, or (h, c, n, m) for an sLSTM,
where m is a constant for the gradient. "bptt" is F = J, computed by autograd.
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


def _lstm(
    x: Tensor, s: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, w_hr: Tensor | None = None
) -> Tensor:
    h, c = s[..., : w_hh.shape[1]], s[..., w_hh.shape[1] :]
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    u = torch.sigmoid(o) * torch.tanh(c)
    return torch.cat([u if w_hr is None else u @ w_hr.T, c], -1)


def _slstm_gates(exponential: bool, x: Tensor, s: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """i, f, z, o and m; a unit with n = 0 starts, with f at most 1."""
    w_ih, w_hh, b_ih, b_hh = weights
    h, _, n, m_before = s.chunk(4, -1)
    width = w_hh.shape[1]
    heads = w_hh.view(4, -1, width, width)
    dense = torch.cat([torch.block_diag(*gate.unbind()) for gate in heads.unbind()])  # type: ignore[no-untyped-call]
    pre_i, pre_f, pre_z, pre_o = (x @ w_ih.T + b_ih + h @ dense.T + b_hh).chunk(4, -1)
    log_f = pre_f if exponential else torch.log(torch.sigmoid(pre_f))
    m = torch.where(n == 0, pre_i, torch.maximum(pre_i, log_f + m_before)).detach()
    # At a first step f multiplies zeros, but it is part of the mean that "calibrated" takes.
    f = torch.exp(torch.clamp(log_f + m_before.detach() - m, max=0))
    return torch.exp(pre_i - m), f, torch.tanh(pre_z), torch.sigmoid(pre_o), m


def _slstm(exponential: bool) -> Step:
    def step(x: Tensor, s: Tensor, *weights: Tensor) -> Tensor:
        _, c, n, _ = s.chunk(4, -1)
        i, f, z, o, m = _slstm_gates(exponential, x, s, *weights)
        c, n = f * c + i * z, f * n + i
        return torch.cat([o * c / n, c, n, m], -1)

    return step


STEPS: dict[str, Step] = {
    "RNN_TANH": _rnn(torch.tanh),
    "RNN_RELU": _rnn(torch.relu),
    "GRU": _gru,
    "LSTM": _lstm,
    "SLSTM": _slstm(exponential=False),
    "SLSTM_EXP": _slstm(exponential=True),
}


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
        factors = _through_h(ctx.mode, x, states, weights)
        width = states.shape[-1] // 4 if ctx.mode.startswith("SLSTM") else weights[1].shape[1]  # of h

        def fed_back(delta: Tensor, t: int | slice) -> Tensor:
            """F^T delta; the gradients of c and n include the path through h of the same step."""
            delta_h, rest = delta[..., :width], delta[..., width:]
            delta_u = delta_h @ weights[4] if len(weights) > 4 else delta_h
            if factors:
                through = torch.cat([factor[t] * delta_u for factor in factors], -1)
                rest = rest + nn.functional.pad(through, (0, rest.shape[-1] - through.shape[-1]))
            return D[t] * torch.cat([delta_h, rest], -1)

        def scan(e: Tensor) -> Tensor:
            delta = [e[-1]]
            for t in reversed(range(len(e) - 1)):
                delta.append(e[t] + fed_back(delta[-1], t + 1))
            return torch.stack(delta[::-1])

        delta = scan(e)
        first = fed_back(delta[0], 0)
        for _ in range(int(corrections or 0)):
            residual = local(delta)[1] - fed_back(delta, slice(None))
            delta = scan(e + torch.cat([residual[1:], torch.zeros_like(e[:1])]))
            first = fed_back(delta[0], 0) + residual[0]
        dx, _, *dw = local(delta)
        return None, None, dx, first, *dw


def _diagonal(mode: str, name: str, x: Tensor, states: Tensor, weights: list[Tensor], local: Any) -> Tensor:
    """D, (T, B, S); zero for m."""
    before, S = states[:-1], states.shape[-1]
    constants = S // 4 if mode.startswith("SLSTM") else 0
    if name == "dsf":
        diagonal = torch.linspace(0, 1, S - constants, dtype=x.dtype, device=x.device)
        return nn.functional.pad(diagonal, (0, constants)).expand_as(before)
    if name == "gate":
        if mode.startswith("SLSTM"):
            f = _slstm_gates(mode == "SLSTM_EXP", x, before, *weights)[1]
            return torch.cat([torch.zeros_like(f), f, f, torch.zeros_like(f)], -1)
        gate = _preactivations(x, before, weights).chunk(3 if mode == "GRU" else 4, -1)[1].sigmoid()
        return gate if mode == "GRU" else nn.functional.pad(gate, (S - gate.shape[-1], 0))
    rows = torch.eye(S, dtype=x.dtype, device=x.device)
    jacobian = torch.stack([local(row.expand_as(before))[1][..., i] for i, row in enumerate(rows)], -1)
    return jacobian.mean((0, 1)).expand_as(before) if name == "calibrated" else jacobian


def _preactivations(x: Tensor, before: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = weights[:4]
    return x @ w_ih.T + b_ih + before[..., : w_hh.shape[1]] @ w_hh.T + b_hh


def _through_h(mode: str, x: Tensor, states: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """dh/dc, or du/dc with a projection, and dh/dn of the same step, (T, B, H) each."""
    if mode == "LSTM":
        c = states[1:, :, weights[1].shape[1] :]
        o = _preactivations(x, states[:-1], weights).chunk(4, -1)[3].sigmoid()
        return [o * (1 - torch.tanh(c) ** 2)]
    if mode.startswith("SLSTM"):
        _, c, n, _ = states[1:].chunk(4, -1)
        o = _slstm_gates(mode == "SLSTM_EXP", x, states[:-1], *weights)[3]
        return [o / n, -o * c / n**2]
    return []


def outputs(layer: Any, rule: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and final states of a layer of any depth and direction, with the gradient of a rule.

    Args:
        layer: torch.nn.RNN, GRU or LSTM, their counterpart in statefeed, or an SLSTM, with float64 weights and biases.
        rule: "bptt", or a diagonal among "dsf", "gate", "jacobian" and "calibrated" (its first batch), with "+k".
        x: (T, B, I), float64; the initial state is zero.

    Returns:
        y (T, B, directions * H), with ``proj_size`` P in place of H, and the final states (L * directions, B, S).
    """
    mode, H = _mode(layer), layer.hidden_size
    width = getattr(layer, "proj_size", 0) or H
    initial = x.new_zeros(x.shape[1], width + H * {"LSTM": 1, "SLSTM": 3, "SLSTM_EXP": 3}.get(mode, 0))
    final = []
    for index in range(layer.num_layers):
        y = []
        for suffix in ("", "_reverse") if layer.bidirectional else ("",):
            weights = [
                getattr(layer, f"{name}_l{index}{suffix}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
                if hasattr(layer, f"{name}_l{index}{suffix}")
            ]
            source = x.flip(0) if suffix else x
            if rule == "bptt":
                steps = [initial]
                for x_t in source:
                    steps.append(STEPS[mode](x_t, steps[-1], *weights))
                states = torch.stack(steps[1:])
            else:
                states = _Rule.apply(mode, rule, source, initial, *weights)  # type: ignore[no-untyped-call]
            final.append(states[-1])
            y.append((states.flip(0) if suffix else states)[..., :width])
        x = torch.cat(y, -1)
    return x, torch.stack(final)


def _mode(layer: Any) -> str:
    """The key of the layer in ``STEPS``."""
    if isinstance(layer, nn.RNNBase):
        return layer.mode
    return "SLSTM_EXP" if layer.forget_gate == "exponential" else "SLSTM"
