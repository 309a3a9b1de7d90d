"""Recurrent over a cell whose state has several tensors: what a diagonal rule loses, and what restores it."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import statefeed as sf

I, H = 6, 16
LOST = r"^feedback \"[^\"]+\" passes no gradient from the output of LSTMCell to the other parts of its state, [^\n]+$"
lost = pytest.mark.filterwarnings("ignore:feedback .* passes no gradient")


def pair(rule: str) -> tuple[sf.LSTM, sf.Recurrent]:
    """sf.LSTM, and Recurrent over torch's cell with the same weights."""
    torch.manual_seed(0)
    layer, other = sf.LSTM(I, H, feedback=rule), sf.Recurrent(nn.LSTMCell(I, H), rule)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            getattr(other.cell, name.removesuffix("_l0")).copy_(weight)
    return layer, other


def loss(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)[0][-1].square().sum()


def cosine(layer: nn.Module, x: torch.Tensor) -> float:
    for _ in range(3):  # a learned rule learns
        loss(layer, x).backward()
    return sf.alignment(layer, loss, x).total.cosine


def test_a_rule_that_loses_the_path_between_parts_warns_once_at_the_line_of_the_user() -> None:
    with pytest.warns(UserWarning, match=LOST) as caught:
        layer = sf.Recurrent(nn.LSTMCell(I, H), "dsf")
    assert [Path(w.filename) for w in caught] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with layer.exact_rule():
            pass
        layer.feedback = "calibrated"
    layer = sf.Recurrent(nn.LSTMCell(I, H))
    with pytest.warns(UserWarning, match=LOST):
        sf.Schedule("bptt@0.5/jacobian").apply(layer, 0.9)


@pytest.mark.parametrize("rule", ["bptt", "torch", "ft-bptt", "ft-bptt+1", "calibrated+1", "jacobian+2"])
def test_rules_without_that_loss_do_not_warn(rule: str) -> None:
    sf.Recurrent(nn.LSTMCell(I, H), rule)
    sf.Recurrent(nn.GRUCell(I, H), "dsf")
    sf.Recurrent(nn.LSTMCell(I, H), "dsf", diagonal_jacobian=True)


@lost
@pytest.mark.parametrize("rule", ["0.5", "calibrated", "jacobian"])
def test_without_corrections_no_gradient_reaches_c(rule: str) -> None:
    layer, other = pair(rule)
    h, c = (torch.zeros(2, H, requires_grad=True) for _ in range(2))
    x = torch.randn(9, 2, I)
    (of_c,) = torch.autograd.grad(other(x, (h, c))[0].square().sum(), c)
    assert not of_c.any()
    with pytest.warns(UserWarning, match="initial state"):
        (of_c,) = torch.autograd.grad(layer(x, (h[None], c[None]))[0].square().sum(), c)
    assert of_c.all()


def test_truncated_gradients_are_those_of_the_layer() -> None:
    x, gradients = torch.randn(9, 2, I), []
    for layer in pair("ft-bptt"):
        gradients.append(torch.autograd.grad(loss(layer, x), list(layer.parameters())))
    order = [[n.removesuffix("_l0") for n, _ in m.named_parameters()] for m in pair("ft-bptt")]
    assert order[0] == [name.removeprefix("cell.") for name in order[1]]
    torch.testing.assert_close(*gradients)


@lost
@pytest.mark.parametrize("rule", ["calibrated", "jacobian"])
def test_a_correction_restores_most_of_it(rule: str) -> None:
    """Without one the rule is about as good as truncation; with one, about as good as the layer without."""
    x = torch.randn(40, 8, I, generator=torch.Generator().manual_seed(1))
    layer, other = pair(rule)
    truncated, without = cosine(pair("ft-bptt")[1], x), cosine(other, x)
    assert abs(without - truncated) < 0.06
    assert cosine(layer, x) > without + 0.04
    assert cosine(pair(f"{rule}+1")[1], x) > without + 0.05
