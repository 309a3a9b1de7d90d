"""The block of xLSTM: against a loop from its equations, in segments, on packed rows, and where it is invalid."""

import math
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from statefeed.lm.config import Model, UsageError
from statefeed.lm.data.batches import IGNORED, Batch
from statefeed.lm.model import LanguageModel, detach_states
from statefeed.lm.model.blocks import CausalConvolution
from statefeed.lm.run.generate import generate

V, T, B, H, HEADS = 19, 9, 3, 8, 2


def language_model(convolution: int, **options: object) -> LanguageModel:
    torch.manual_seed(0)
    recipe = Model(
        cell="slstm",
        block="xlstm",
        layers=2,
        width=H,
        heads=HEADS,
        convolution=convolution,
        **{"feedback": "bptt", **options},  # type: ignore[arg-type]
    )
    model = LanguageModel(recipe, V).double()
    for parameter in model.parameters():  # far from its start, where everything is nearly linear
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int = 1) -> Tensor:
    grouped = x.reshape(len(x), groups, -1)
    mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, correction=0, keepdim=True)
    return ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def block(w: dict[str, Tensor], xs: list[Tensor], kernel: int) -> list[Tensor]:
    """The block on a sequence of rows (B, H), step by step, with dense recurrent weights and no stabilizer."""
    normed = [layer_norm(x, w["rnn_norm.weight"], w["rnn_norm.bias"]) for x in xs]
    zero = torch.zeros_like(normed[0])
    h, c, n = zero, zero, zero
    size, out = H // HEADS, []
    for t, x in enumerate(xs):
        inputs = normed[t]
        if kernel:
            taps = [normed[t - k] if t >= k else zero for k in range(kernel)]
            y = w["convolution.bias"] + sum(
                w["convolution.weight"][:, 0, kernel - 1 - k] * taps[k] for k in range(kernel)
            )
            inputs = torch.cat([y * torch.sigmoid(y), inputs], -1)
        pre = inputs @ w["rnn.weight_ih_l0"].T + w["rnn.bias_ih_l0"] + w["rnn.bias_hh_l0"]
        recurrent = []
        for gate in range(4):
            for head in range(HEADS):
                rows = slice(gate * H + head * size, gate * H + (head + 1) * size)
                recurrent.append(h[:, head * size : (head + 1) * size] @ w["rnn.weight_hh_l0"][rows].T)
        i, f, z, o = (pre + torch.cat(recurrent, -1)).chunk(4, -1)
        c = torch.sigmoid(f) * c + i.exp() * torch.tanh(z)
        n = torch.sigmoid(f) * n + i.exp()
        h = torch.sigmoid(o) * c / n
        x = x + layer_norm(h, w["head_norm.weight"], w["head_norm.bias"], HEADS)
        a, b = (layer_norm(x, w["mlp_norm.weight"], w["mlp_norm.bias"]) @ w["up.weight"].T + w["up.bias"]).chunk(2, -1)
        out.append(x + (gelu(a) * b) @ w["down.weight"].T + w["down.bias"])
    return out


@pytest.mark.parametrize("kernel", [0, 1, 4])
def test_the_block_is_that_of_its_equations_with_its_gradient(kernel: int) -> None:
    model = language_model(kernel)
    weights = dict(model.named_parameters())
    tokens = torch.randint(V, (T, B))
    rows = list(weights["embedding.weight"][tokens])
    for k in range(2):
        prefix = f"blocks.{k}."
        rows = block({name.removeprefix(prefix): w for name, w in weights.items() if prefix in name}, rows, kernel)
    expected = torch.stack([layer_norm(x, weights["norm.weight"], weights["norm.bias"]) for x in rows])
    expected = expected @ weights["head.weight"].T + weights["head.bias"]
    logits, _ = model(tokens)
    torch.testing.assert_close(logits, expected)
    grad = torch.randn_like(logits)
    found, truth = (torch.autograd.grad(y, list(weights.values()), grad) for y in (logits, expected))
    for name, a, b in zip(weights, found, truth, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_the_hidden_width_of_the_mlp_is_four_thirds_in_steps_of_8() -> None:
    sizes = {H: Model(cell="slstm", block="xlstm", width=H, heads=1, layers=1) for H in (6, 12, 24, 256)}
    hidden = {H: LanguageModel(recipe, V).blocks[0].down.in_features for H, recipe in sizes.items()}  # type: ignore[union-attr]
    assert hidden == {6: 8, 12: 16, 24: 32, 256: 344}


@pytest.mark.parametrize("cuts", [(4,), (1, 2, 7), tuple(range(1, T))])
@pytest.mark.parametrize("kernel", [0, 4])
@torch.no_grad()
def test_a_text_read_in_segments_has_the_logits_of_one_call(kernel: int, cuts: tuple[int, ...]) -> None:
    model = language_model(kernel)
    tokens = torch.randint(V, (T, B))
    whole, _ = model(tokens)
    states, found = None, []
    for segment in tokens.tensor_split(cuts):
        logits, states = model(segment, states)
        found.append(logits)
        states = detach_states(states, torch.ones(B, 1, dtype=torch.bool))
    torch.testing.assert_close(torch.cat(found), whole)


@torch.no_grad()
def test_a_reset_column_starts_as_at_the_beginning_of_a_text() -> None:
    model = language_model(4)
    tokens = torch.randint(V, (T, B))
    _, states = model(tokens)
    after, _ = model(tokens, detach_states(states, torch.tensor([[True], [False], [True]])))
    continued, _ = model(tokens, states)
    from_zero, _ = model(tokens)
    torch.testing.assert_close(after[:, [0, 2]], continued[:, [0, 2]])
    torch.testing.assert_close(after[:, 1], from_zero[:, 1])
    assert (continued[0] - from_zero[0]).abs().max() > 1e-3


def test_the_loss_of_padded_sentences_and_its_gradient_are_those_of_each_sentence() -> None:
    """No convolution reads another sentence, and equal lengths keep their order."""
    model = language_model(4, feedback="gate+1")
    sentences = [torch.randint(1, V, (length,)) for length in (6, 2, 9, 6, 3, 6)]
    inputs = nn.utils.rnn.pad_sequence([sentence[:-1] for sentence in sentences], padding_value=V - 1)
    targets = nn.utils.rnn.pad_sequence([sentence[1:] for sentence in sentences], padding_value=IGNORED)
    together = model.loss(Batch(inputs, targets, torch.tensor([len(s) - 1 for s in sentences]), is_start=True))
    together.sum.backward()  # type: ignore[no-untyped-call]
    padded = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    alone = [model.loss(Batch(s[:-1, None], s[1:, None], None, is_start=True)) for s in sentences]
    torch.stack([loss.sum for loss in alone]).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(together.sum, torch.stack([loss.sum for loss in alone]).sum())
    for (name, parameter), grad in zip(model.named_parameters(), padded, strict=True):
        torch.testing.assert_close(grad, parameter.grad, msg=lambda m, name=name: f"{name}: {m}")
    for k, states in enumerate(zip(*(loss.states[0] for loss in alone), strict=True)):
        torch.testing.assert_close(together.states[0][k], torch.cat(states, 1))


@torch.no_grad()
def test_a_convolution_is_torchs_with_zeros_before_the_sequence() -> None:
    layer = CausalConvolution(H, 4)
    plain = nn.Conv1d(H, H, 4, groups=H)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, H)
    expected = plain(nn.functional.pad(x.permute(1, 2, 0), (3, 0))).permute(2, 0, 1)
    y, state = layer(x, None, None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, x[-3:])


def test_sampling_is_the_argmax_of_the_whole_text() -> None:
    model = language_model(4).eval()
    text = [3, 1, 4]
    for token in islice(generate(model, text, top_k=1), 12):
        assert token == model(torch.tensor(text).unsqueeze(1))[0][-1, 0].argmax()
        text.append(token)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cell": "gru", "block": "xlstm"}, r"model\.cell must be slstm in an xlstm block, got gru"),
        ({"cell": "slstm", "width": 12, "heads": 8}, r"model\.width must be a multiple of model\.heads, 8, got 12"),
        ({"cell": "slstm", "heads": 0}, r"model\.heads must be at least 1, got 0"),
        ({"cell": "slstm", "convolution": -1}, r"model\.convolution must be at least 0, got -1"),
    ],
)
def test_user_errors(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Model(**options)  # type: ignore[arg-type]
