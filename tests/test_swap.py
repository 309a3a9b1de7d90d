"""swap and restore on models of one's own: same parameters, same outputs, nothing left behind."""

import copy
import pickle

import pytest
import torch
from torch import nn

import statefeed as sf


class Tagger(nn.Module):
    """Two recurrent layers, one of them used twice, weights of the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.GRU(6, 6, num_layers=2, batch_first=True, dropout=0.2)
        self.again = self.encoder
        self.decoder = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.encoder(self.embed(tokens))
        x, _ = self.again(x)
        x, _ = self.decoder(x)
        return self.head(x)


@pytest.fixture
def model() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))


def test_swap_keeps_parameters_sharing_names_and_outputs(model: Tagger, tokens: torch.Tensor) -> None:
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    model.eval()
    before = model(tokens)
    report = sf.swap(model, feedback="gate+1")
    assert isinstance(model.encoder, sf.GRU)
    assert isinstance(model.decoder, sf.LSTM)
    assert model.again is model.encoder
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert not model.encoder.training
    assert set(report.swapped) == {"encoder", "decoder"}
    assert not report.kept
    torch.testing.assert_close(model(tokens), before)


def test_an_optimiser_built_before_goes_on_and_the_rule_is_in_force(model: Tagger, tokens: torch.Tensor) -> None:
    model.eval()
    exact = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sf.swap(model, feedback="dsf")
    for m in (model, exact):
        m(tokens).square().sum().backward()
    assert not torch.allclose(model.decoder.weight_hh_l0.grad, exact.decoder.weight_hh_l0.grad, rtol=0.01)
    before = model.decoder.weight_hh_l0.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.decoder.weight_hh_l0, before - model.decoder.weight_hh_l0.grad)


def test_restore_leaves_nothing_of_statefeed(model: Tagger, tokens: torch.Tensor) -> None:
    plain = copy.deepcopy(model)
    sf.swap(model, feedback="calibrated")
    model(tokens).sum().backward()
    assert model.encoder.diagonal.any()
    model.zero_grad(set_to_none=True)
    assert sf.restore(model) is model
    for ours, torchs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(torchs)
        assert set(vars(ours)) == set(vars(torchs))
        assert set(ours._buffers) == set(torchs._buffers)
    assert b"statefeed" not in pickle.dumps(model.encoder)
    torch.manual_seed(2)
    ours = model(tokens)
    torch.manual_seed(2)
    torch.testing.assert_close(ours, plain(tokens))


def test_hooks_still_fire(model: Tagger, tokens: torch.Tensor) -> None:
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    sf.swap(model)
    model(tokens)
    assert len(calls) == 2


def test_include_exclude_and_dry_run(model: Tagger) -> None:
    report = sf.swap(model, include=["enc*"], dry_run=True)
    assert type(model.encoder) is nn.GRU
    assert list(report.swapped) == ["encoder"]
    assert report.kept == {"decoder": "not included"}
    report = sf.swap(model, exclude=["decoder"])
    assert type(model.decoder) is nn.LSTM
    assert report.kept == {"decoder": "excluded"}
    assert str(report).splitlines()[0].startswith("swapped  encoder: GRU(6, 6, num_layers=2")


def test_one_pattern_alone_is_a_pattern_and_not_its_letters(model: Tagger) -> None:
    assert list(sf.swap(model, include="enc*", dry_run=True).swapped) == ["encoder"]
    assert sf.swap(model, exclude="decoder").kept == {"decoder": "excluded"}
    assert type(model.decoder) is nn.LSTM


def test_what_cannot_run_under_the_rule_is_kept_and_says_why() -> None:
    class Mine(nn.GRU):
        pass

    model = nn.ModuleList([nn.RNN(2, 3), nn.LSTM(2, 4, proj_size=2), Mine(2, 3), nn.GRU(2, 3)])
    report = sf.swap(model, feedback="gate")
    assert list(report.swapped) == ["3"]
    assert "RNN" in report.kept["0"]
    assert "proj_size" in report.kept["1"]
    assert "subclass" in report.kept["2"]
    assert [type(m) for m in model[:3]] == [nn.RNN, nn.LSTM, Mine]


def test_a_bad_rule_changes_nothing(model: Tagger) -> None:
    with pytest.raises(ValueError, match="feedback must be"):
        sf.swap(model, feedback="dfs")
    assert type(model.encoder) is nn.GRU


def test_a_layer_of_ours_takes_the_new_rule_and_the_model_may_be_the_layer() -> None:
    layer = sf.GRU(2, 3, feedback="dsf")
    report = sf.swap(layer, feedback="jacobian")
    assert str(layer.feedback) == "jacobian"
    assert "(the model)" in str(report)
    assert type(sf.restore(layer)) is nn.GRU
