"""alignment: cosine and norm ratio against gradients taken by hand, on a model that it leaves as it was."""

import copy
import math

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = pytest.mark.filterwarnings("ignore:the initial state", "ignore:feedback .* adds corrections")


class Model(nn.Module):
    """Two recurrent layers under two rules, dropout, a batch norm with buffers, a part that the loss never reaches."""

    def __init__(self, first="calibrated", second="dsf", dropout=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.first = sf.GRU(3, 5, num_layers=2, dropout=dropout, feedback=first)
        self.second = sf.LSTM(5, 4, feedback=second)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)
        self.idle = sf.RNN(2, 2)
        for weight in (*self.first.parameters(), *self.second.parameters()):
            nn.init.normal_(weight, std=0.5)
        self.double()

    def forward(self, x):
        y, _ = self.second(self.first(x)[0])
        return self.head(self.norm(y.flatten(0, 1)))


def loss(model, x):
    return model(x).square().sum()


@pytest.fixture
def x():
    return torch.randn(8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    """By plain autograd, under the rules that a copy of the model has."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss(model, x).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agreement(ours, exact, names):
    a, b = (torch.cat([side[name].flatten() for name in names]) for side in (ours, exact))
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())


def by_hand(model, x):
    exact = copy.deepcopy(model)
    for layer in (exact.first, exact.second):
        layer.feedback = "bptt"
    torch.manual_seed(7)
    ours = gradients(model, x)
    torch.manual_seed(7)
    return ours, gradients(exact, x)


def test_it_measures_what_autograd_gives(x):
    model = Model()
    ours, exact = by_hand(model, x)
    torch.manual_seed(7)
    found = sf.alignment(model, loss, x)
    assert set(found.parameters) == set(ours)
    for name, value in found.parameters.items():
        assert (value.cosine, value.norm_ratio) == pytest.approx(agreement(ours, exact, [name]), abs=1e-12)
    assert set(found.layers) == {"first", "second"}
    for layer, value in found.layers.items():
        names = [name for name in ours if name.startswith(layer)]
        assert (value.cosine, value.norm_ratio) == pytest.approx(agreement(ours, exact, names), abs=1e-12)
    assert (found.total.cosine, found.total.norm_ratio) == pytest.approx(agreement(ours, exact, list(ours)), abs=1e-12)
    assert found.total.cosine < 0.999


@pytest.mark.parametrize("rule", ["bptt", "jacobian+8"])
def test_exact_rules_agree_wholly(rule, x):
    """Dropout masks are the same in both passes, or the two would differ."""
    found = sf.alignment(Model(rule, rule), loss, x)
    for value in (found.total, *found.parameters.values(), *found.layers.values()):
        assert (value.cosine, value.norm_ratio) == pytest.approx((1, 1), abs=1e-9)


def test_the_model_is_as_it_was(x):
    model = Model("calibrated+1", "gate")
    loss(model, x).backward()
    other = copy.deepcopy(model)
    rules = [layer.feedback for layer in (model.first, model.second, model.idle)]
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    sf.alignment(model, loss, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.feedback for layer in (model.first, model.second, model.idle)] == rules
    assert model.training
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert (p.grad is None and grads[name] is None) or torch.equal(p.grad, grads[name])
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in other.named_buffers()}
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_the_model_is_as_it_was_after_a_loss_that_fails(x):
    model, calls = Model("calibrated", "gate"), []

    def failing(model, x):
        calls.append(model.second.feedback)
        if len(calls) == 2:
            raise ArithmeticError("on purpose")
        return loss(model, x)

    buffers = [b.clone() for b in model.buffers()]
    with pytest.raises(ArithmeticError, match="on purpose"):
        sf.alignment(model, failing, x)
    assert calls == [sf.Feedback("gate"), sf.Feedback("bptt")]
    assert model.first.feedback == sf.Feedback("calibrated")
    assert model.second.feedback == sf.Feedback("gate")
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_it_works_under_no_grad_and_on_a_bare_layer(x):
    layer = sf.GRU(3, 4, feedback="ft-bptt").double()
    with torch.no_grad():
        found = sf.alignment(layer, lambda model, x: model(x)[0].square().sum(), x)
    assert set(found.parameters) == {name for name, _ in layer.named_parameters()}
    assert 0 < found.total.cosine < 1


def test_parameters_that_need_no_gradient_are_left_out(x):
    model = Model()
    model.first.requires_grad_(False)
    found = sf.alignment(model, loss, x)
    assert set(found.layers) == {"second"}
    assert not [name for name in found.parameters if name.startswith("first")]


def test_a_gradient_of_zero_has_no_angle(x):
    layer = sf.GRU(3, 4).double()
    found = sf.alignment(layer, lambda model, x: 0 * model(x)[0].sum(), x)
    assert math.isnan(found.total.cosine)
    assert math.isnan(found.total.norm_ratio)


@pytest.mark.parametrize("model", [nn.Linear(3, 1), nn.GRU(3, 4), sf.GRU(3, 4).requires_grad_(False)])
def test_a_model_without_anything_to_align_is_refused(model):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        sf.alignment(model, lambda model, x: model(x).sum(), torch.zeros(2, 1, 3))
