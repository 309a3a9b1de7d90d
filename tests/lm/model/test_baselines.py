"""Baselines: against loops from their equations, causal, the same in pieces as in one, and one token at a time."""

import math
from itertools import islice
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from statefeed.lm.config import Model
from statefeed.lm.model import LanguageModel
from statefeed.lm.model.baselines import S4D, Attention, MinGRU
from statefeed.lm.run.generate import generate

Cell = Literal["rnn", "gru", "lstm", "slstm", "transformer", "s4d", "mingru"]
CELLS = ("rnn", "gru", "lstm", "slstm", "transformer", "s4d", "mingru")
BASELINES = ("transformer", "s4d", "mingru")
V, T, B, H = 19, 11, 3, 8


def language_model(cell: Cell) -> LanguageModel:
    torch.manual_seed(0)
    recipe = Model(cell=cell, feedback="bptt", width=H, heads=2, window=5, modes=3, block="prenorm")
    model = LanguageModel(recipe, V)
    for parameter in model.parameters():  # far from its start, where everything is nearly linear
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_changing_a_token_changes_no_output_before_it(cell: Cell) -> None:
    model = language_model(cell)
    tokens = torch.randint(V, (T, B))
    logits, _ = model(tokens)
    for t in range(T):
        changed = tokens.clone()
        changed[t] = (tokens[t] + 1) % V
        after, _ = model(changed)
        # a convolution by FFT mixes rounding errors, and nothing else, into what came before
        torch.testing.assert_close(after[:t], logits[:t], rtol=1e-5, atol=2e-5)
        assert (after[t] - logits[t]).abs().max() > 1e-3


@pytest.mark.parametrize("cell", BASELINES)
def test_no_gradient_comes_from_later_tokens(cell: Cell) -> None:
    layer = language_model(cell).blocks[0].rnn
    assert isinstance(layer, nn.Module)
    x = torch.randn(T, B, H, requires_grad=True)
    y, _ = layer(x)
    (grad,) = torch.autograd.grad(y[4].sum(), x)
    assert grad[5:].abs().max() < 1e-6
    assert grad[4].abs().min() > 0


@pytest.mark.parametrize("cuts", [(4,), (1, 2, 9), tuple(range(1, T))])
@pytest.mark.parametrize("cell", BASELINES)
@torch.no_grad()
def test_a_text_read_in_segments_has_the_logits_of_one_call(cell: Cell, cuts: tuple[int, ...]) -> None:
    model = language_model(cell)
    tokens = torch.randint(V, (T, B))
    whole, _ = model(tokens)
    states, found = None, []
    for piece in tokens.tensor_split(cuts):
        logits, states = model(piece, states)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cell", BASELINES)
def test_sampling_is_the_argmax_of_the_whole_text_and_the_state_stays_as_large(cell: Cell) -> None:
    model = language_model(cell).eval()
    text = [3, 1, 4]
    for token in islice(generate(model, text, top_k=1), 20):
        assert token == model(torch.tensor(text).unsqueeze(1))[0][-1, 0].argmax()
        text.append(token)

    def size(states: list[Tensor | tuple[Tensor, ...]]) -> int:
        return sum(part.numel() for s in states for part in ([s] if isinstance(s, Tensor) else s))

    _, after_many = model(torch.randint(V, (50, 1)))
    _, after_more = model(torch.randint(V, (1, 1)), after_many)
    assert size(after_more) == size(after_many)


@pytest.mark.parametrize("cell", BASELINES)
def test_padding_after_the_end_of_a_column_changes_no_output_before_it(cell: Cell) -> None:
    layer = language_model(cell).blocks[0].rnn
    assert isinstance(layer, nn.Module)
    x = torch.randn(T, B, H)
    changed = x.clone()
    changed[6:, 1] = 7.0
    found, expected = layer(changed)[0], layer(x)[0]
    torch.testing.assert_close(found[:6], expected[:6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, [0, 2]], expected[:, [0, 2]])


@torch.no_grad()
def test_mingru_is_its_equation() -> None:
    layer = MinGRU(H)
    x = torch.randn(T, B, H)
    (wz, wn), (bz, bn) = layer.gate_and_candidate.weight.chunk(2), layer.gate_and_candidate.bias.chunk(2)
    h = torch.zeros(B, H)
    y, state = layer(x)
    for t in range(T):
        z = torch.sigmoid(x[t] @ wz.T + bz)
        h = (1 - z) * h + z * (x[t] @ wn.T + bn)
        torch.testing.assert_close(y[t], h)
    torch.testing.assert_close(state[0], h)


@torch.no_grad()
def test_s4d_is_its_equation() -> None:
    layer = S4D(H, modes=5)
    layer.frequency.data += torch.randn_like(layer.frequency)
    layer.log_decay.data += torch.randn_like(layer.log_decay)
    x = torch.randn(T, B, H)
    y, state = layer(x)
    for b in range(B):
        for h in range(H):
            dt = math.exp(layer.log_dt[h].item())
            modes = [(complex(-math.exp(d), f), complex(*c)) for d, f, c in zip(
                layer.log_decay[h].tolist(), layer.frequency[h].tolist(), layer.readout[h].tolist(), strict=True
            )]  # fmt: skip
            s = [0j] * len(modes)
            for t in range(T):
                u = x[t, b, h].item()
                a = [complex(math.e) ** (dt * A) for A, _ in modes]
                s = [a * s + (a - 1) / A * u for a, s, (A, _) in zip(a, s, modes, strict=True)]
                out = 2 * sum(C * s for s, (_, C) in zip(s, modes, strict=True)).real + layer.direct[h].item() * u
                gelu = 0.5 * out * (1 + math.erf(out / math.sqrt(2)))
                assert y[t, b, h].item() == pytest.approx(gelu, rel=1e-4, abs=1e-5)
            assert state.view(B, H, -1)[b, h].tolist() == pytest.approx(s, rel=1e-4, abs=1e-6)


def test_s4d_starts_at_the_published_place() -> None:
    torch.manual_seed(0)
    layer = S4D(2000, modes=4)
    assert layer.log_decay.exp().unique().tolist() == pytest.approx([0.5])
    torch.testing.assert_close(layer.frequency[7], math.pi * torch.arange(4.0))
    assert layer.log_dt.min().item() == pytest.approx(math.log(0.001), abs=0.02)
    assert layer.log_dt.max().item() == pytest.approx(math.log(0.1), abs=0.02)


@torch.no_grad()
def test_attention_is_softmax_over_the_window_with_keys_turned_by_distance() -> None:
    heads, window = 2, 4
    layer = Attention(H, heads, window)
    layer.project.weight.data *= 40
    x = torch.randn(T, B, H)
    y, _ = layer(x)
    size = H // heads

    def turned(vector: Tensor, place: int) -> Tensor:
        """Each pair of units as a complex number, times exp(i place 10000^(-j / pairs))."""
        pairs = torch.complex(vector[: size // 2], vector[size // 2 :])
        angles = place * 10_000.0 ** (-torch.arange(size // 2) / (size // 2))
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag])

    for b in range(B):
        q, k, v = (x[:, b] @ layer.project.weight.T + layer.project.bias).chunk(3, 1)
        for head in range(heads):
            units = slice(head * size, (head + 1) * size)
            for t in range(T):
                seen = range(max(0, t - window + 1), t + 1)
                scores = [turned(q[t, units], t) @ turned(k[j, units], j) / math.sqrt(size) for j in seen]
                weights = torch.stack(scores).softmax(0)
                expected = sum(w * v[j, units] for w, j in zip(weights, seen, strict=True))
                torch.testing.assert_close(y[t, b, units], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", BASELINES)
def test_gradients_reach_every_parameter_and_are_those_of_finite_differences(cell: Cell) -> None:
    layer = language_model(cell).blocks[0].rnn
    assert isinstance(layer, nn.Module)
    layer.double()
    x = torch.randn(5, 2, H, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def output(*parameters: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0]
        return y

    parameters = tuple(p.detach().requires_grad_() for p in layer.parameters())
    assert torch.autograd.gradcheck(output, parameters, fast_mode=True)


@pytest.mark.parametrize("cell", BASELINES)
@torch.no_grad()
def test_autocast_keeps_the_recurrence_in_float32(cell: Cell) -> None:
    model = language_model(cell)
    tokens = torch.randint(V, (T, B))
    exact, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16, states = model(tokens)
    assert (in_bf16 - exact).abs().max() < 0.1 * exact.abs().max()
    if cell != "transformer":
        assert all(state.dtype in (torch.float32, torch.complex64) for state in states)
