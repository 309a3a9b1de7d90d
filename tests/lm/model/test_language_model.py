"""The model: its shape, its initial weights, its state, and that it is a plain torch.nn model underneath."""

import math

import pytest
import torch
from torch import Tensor, nn

from statefeed.lm.config import Model, UsageError
from statefeed.lm.data.batches import IGNORED, Batch
from statefeed.lm.model.language_model import LanguageModel, detach_states

V, T, B = 29, 7, 3


@pytest.mark.parametrize("block", ["plain", "prenorm"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "slstm"])
def test_a_text_read_in_two_segments_has_the_logits_of_one_call(cell: str, block: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(Model(cell=cell, block=block, width=8), V)  # type: ignore[arg-type]
    tokens = torch.randint(V, (T, B))
    whole, _ = model(tokens)
    first, states = model(tokens[:3])
    second, _ = model(tokens[3:], detach_states(states, torch.ones(B, 1)))
    assert whole.shape == (T, B, V)
    torch.testing.assert_close(torch.cat([first, second]), whole)


@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm"])
def test_the_state_of_some_columns_is_reset(cell: str) -> None:
    model = LanguageModel(Model(cell=cell, width=8), V)  # type: ignore[arg-type]
    tokens = torch.randint(V, (T, B))
    _, states = model(tokens)
    after, _ = model(tokens, detach_states(states, torch.tensor([[True], [False], [True]])))
    continued, _ = model(tokens, detach_states(states, torch.ones(B, 1)))
    from_zero, _ = model(tokens)
    torch.testing.assert_close(after[:, [0, 2]], continued[:, [0, 2]])
    torch.testing.assert_close(after[:, 1], from_zero[:, 1])
    assert all(not part.requires_grad for s in detach_states(states, torch.ones(B, 1)) for part in s)


def test_plain_block_is_x_plus_rnn_of_x() -> None:
    model = LanguageModel(Model(width=8, layers=2), V)
    tokens = torch.randint(V, (T, B))
    x = model.embedding(tokens)
    for i in range(2):
        plain = nn.GRU(8, 8)
        plain.load_state_dict({k.split("rnn.")[1]: v for k, v in model.state_dict().items() if f"blocks.{i}.rnn" in k})
        x = x + plain(x)[0]
    torch.testing.assert_close(model(tokens)[0], model.head(x))


def test_prenorm_block_is_two_residual_sub_layers_and_a_final_norm() -> None:
    model = LanguageModel(Model(width=8, layers=1, block="prenorm", cell="rnn"), V)
    weights = model.state_dict()
    tokens = torch.randint(V, (T, B))

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    x = weights["embedding.weight"][tokens]
    plain = nn.RNN(8, 8)
    plain.load_state_dict({k.split("rnn.")[1]: v for k, v in weights.items() if ".rnn." in k})
    x = x + linear("blocks.0.linear", plain(norm(x))[0])
    x = x + linear("blocks.0.narrow", nn.functional.gelu(linear("blocks.0.widen", norm(x))))
    assert weights["blocks.0.widen.weight"].shape == (32, 8)
    torch.testing.assert_close(model(tokens)[0], linear("head", norm(x)))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    layers = 3
    weights = LanguageModel(Model(width=128, layers=layers, block="prenorm"), 500).state_dict()
    for name in ("embedding.weight", "head.weight", "blocks.1.widen.weight"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.03)
    for name in ("blocks.1.linear.weight", "blocks.2.narrow.weight"):
        assert weights[name].std().item() == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.03)
    for name, value in weights.items():
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all()
        if name.endswith("bias"):
            assert (value == 0).all()
        if ".rnn." in name:  # torch's own: uniform up to 1 / sqrt(H)
            assert value.abs().max().item() == pytest.approx(1 / math.sqrt(128), rel=0.02)


def test_loss_counts_the_marked_targets_out() -> None:
    model = LanguageModel(Model(width=8), V)
    tokens = torch.randint(V, (T, B))
    targets = torch.randint(V, (T, B))
    targets[2:, 1] = IGNORED
    logits, _ = model(tokens)
    expected = [-logits[t, b].log_softmax(0)[targets[t, b]] for t in range(T) for b in range(B) if b != 1 or t < 2]
    loss = model.loss(Batch(tokens, targets, None, is_start=True))
    assert loss.tokens == len(expected)
    torch.testing.assert_close(loss.mean, torch.stack(expected).mean())


def test_dropout_acts_in_training_only() -> None:
    model = LanguageModel(Model(width=8, dropout=0.5), V)
    tokens = torch.randint(V, (T, B))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(("cell", "feedback"), [("rnn", "gate"), ("gru", "dfs"), ("gru", "gate+x")])
def test_an_unknown_or_unsupported_rule_raises(cell: str, feedback: str) -> None:
    with pytest.raises(UsageError, match=f"model.feedback={feedback.split('+')[0]}") as refused:
        LanguageModel(Model(cell=cell, feedback=feedback), V)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_the_rule_reaches_every_layer_and_changes_only_the_gradient() -> None:
    torch.manual_seed(0)
    exact = LanguageModel(Model(width=8, feedback="bptt"), V)
    cheap = LanguageModel(Model(width=8, feedback="dsf"), V)
    cheap.load_state_dict(exact.state_dict())
    tokens, targets = torch.randint(V, (2, T, B))
    losses = [model.loss(Batch(tokens, targets, None, is_start=True)).mean for model in (exact, cheap)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    for layer in range(2):
        a, b = (model.blocks[layer].rnn.weight_hh_l0.grad for model in (exact, cheap))  # type: ignore[union-attr]
        assert not torch.allclose(a, b, rtol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "slstm"])
@pytest.mark.parametrize("block", ["plain", "prenorm", "stacked"])
def test_the_loss_of_padded_sentences_is_that_of_each_sentence(cell: str, block: str) -> None:
    """Neither the loss nor a gradient knows how far a column is filled up, nor with what."""
    torch.manual_seed(0)
    model = LanguageModel(Model(cell=cell, block=block, width=8, feedback="dsf"), V)  # type: ignore[arg-type]
    sentences = [torch.randint(1, V, (length,)) for length in (6, 2, 9, 3)]
    inputs = nn.utils.rnn.pad_sequence([sentence[:-1] for sentence in sentences], padding_value=V - 1)
    targets = nn.utils.rnn.pad_sequence([sentence[1:] for sentence in sentences], padding_value=IGNORED)
    together = model.loss(Batch(inputs, targets, torch.tensor([5, 1, 8, 2]), is_start=True))
    assert together.tokens == 16
    assert together.mean.item() == pytest.approx(together.sum.item() / 16)
    together.sum.backward()  # type: ignore[no-untyped-call]
    padded = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    alone = torch.stack(
        [model.loss(Batch(s[:-1, None], s[1:, None], None, is_start=True)).sum for s in sentences]
    ).sum()
    alone.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(together.sum, alone)
    for (name, parameter), grad in zip(model.named_parameters(), padded, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_with_is_start_ignores_the_states() -> None:
    model = LanguageModel(Model(width=8), V)
    tokens = torch.randint(V, (2, T, B))
    _, states = model(tokens[0])
    states = detach_states(states, torch.ones(B, 1))
    continued, fresh = (model.loss(Batch(*tokens, None, is_start=fresh), states).sum.item() for fresh in (False, True))
    assert fresh == model.loss(Batch(*tokens, None, is_start=True)).sum.item() != continued


def test_stacked_blocks_are_the_layers_of_torch_on_top_of_each_other() -> None:
    model = LanguageModel(Model(cell="lstm", block="stacked", width=8, layers=2, uniform=0.1), V)
    plain = nn.LSTM(8, 8, num_layers=2)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = model.state_dict()
    plain.load_state_dict({f"{n}_l{i}": weights[f"blocks.{i}.rnn.{n}_l0"] for i in range(2) for n in names})
    tokens = torch.randint(V, (T, B))
    torch.testing.assert_close(model(tokens)[0], model.head(plain(model.embedding(tokens))[0]))


def test_dropout_of_stacked_blocks_is_on_every_path_but_the_recurrent_one() -> None:
    """With everything dropped but once, what is left is the head's bias: inputs, between layers, and the output."""
    model = LanguageModel(Model(cell="lstm", block="stacked", width=8, layers=2, dropout=0.5), V)
    dropouts = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert dropouts == ["dropout", "blocks.0.dropout", "blocks.1.dropout"]
    assert all(block.rnn.dropout == 0 for block in model.blocks)  # type: ignore[union-attr]


def test_uniform_weights_are_uniform_everywhere() -> None:
    torch.manual_seed(0)
    model = LanguageModel(Model(cell="lstm", block="stacked", width=64, uniform=0.1), 300)
    for name, weight in model.named_parameters():
        assert weight.abs().max().item() == pytest.approx(0.1, rel=0.02), name
        assert weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.15), name


def test_a_schedule_of_rules_begins_with_its_first() -> None:
    model = LanguageModel(Model(width=8, feedback="dsf@0.3/gate+1"), V)
    assert [str(block.rnn.feedback) for block in model.blocks] == ["dsf", "dsf"]  # type: ignore[union-attr]
