"""What learned rules store in a layer: one diagonal per rule, and its dtype."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import statefeed as sf

MAKERS = {
    "gru": lambda rule: sf.GRU(3, 8, feedback=rule),
    "slstm": lambda rule: sf.SLSTM(3, 8, feedback=rule),
    "recurrent": lambda rule: sf.Recurrent(nn.GRUCell(3, 8), rule),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(40, 4, 3)


def gradients(layer, x):
    return torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))


def is_exact(layer, x):
    """Whether the next backward pass has the exact gradient."""
    found = gradients(layer, x)
    with layer.exact_rule():
        exact = gradients(layer, x)
    return all(torch.allclose(f, e, rtol=1e-4, atol=1e-3) for f, e in zip(found, exact, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_the_first_pass_under_fitted_is_exact_after_another_learned_rule(kind, x):
    layer, schedule = MAKERS[kind]("bptt"), sf.Schedule("calibrated@0.5/fitted")
    exact = []
    for step in range(10):
        schedule.apply(layer, step / 10)
        exact.append(is_exact(layer, x))
    assert exact == [False] * 5 + [True] + [False] * 4
    alone = copy.deepcopy(layer)
    alone.reset_diagonal()
    gradients(alone, x)
    assert torch.equal(layer.diagonal, alone.diagonal)
    assert layer.diagonal_updates.tolist() == [5]


@pytest.mark.parametrize("rule", ["calibrated", "fitted"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_pass_that_overflows_is_not_counted(kind, rule, x):
    layer = MAKERS[kind](rule)
    alone = copy.deepcopy(layer)
    gradients(layer, torch.full_like(x, torch.nan))
    assert layer.diagonal_updates.tolist() == [0]
    for other in (layer, alone):
        torch.manual_seed(1)  # Recurrent draws signs
        gradients(other, x)
    assert alone.diagonal.any()
    assert torch.equal(layer.diagonal, alone.diagonal)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_exact_pass_runs_once_over_time(bidirectional, x):
    """Two products for each of W_ih and W_hh, as BPTT has, and one each for the gates."""
    layer = sf.GRU(3, 8, bidirectional=bidirectional, feedback="fitted")
    y, _ = layer(x.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 4 * 3 * 8 * (3 + 8) * (2 if bidirectional else 1)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_running_mean_does_not_begin_with_the_fit(kind, x):
    layer, alone = MAKERS[kind]("fitted"), None
    gradients(layer, x)
    alone = copy.deepcopy(layer)
    alone.reset_diagonal()
    for other in (layer, alone):
        other.feedback = "calibrated"
    for other in (layer, alone):
        torch.manual_seed(1)  # Recurrent draws signs
        gradients(other, x)
    assert torch.equal(layer.diagonal, alone.diagonal)
    assert layer.diagonal_updates.tolist() == [1]


@pytest.mark.parametrize("between", ["dsf", "torch", "calibrated", "calibrated+1"])
@pytest.mark.parametrize("after", ["fitted", "fitted+1"])
def test_a_learned_rule_continues_where_it_was(between, after, x):
    layer = sf.GRU(3, 8, feedback="fitted")
    gradients(layer, x), gradients(layer, x)
    before = copy.deepcopy(layer.learned_tensors())
    layer.feedback = between
    gradients(layer, x)
    layer.feedback = after
    torch.testing.assert_close(layer.learned_tensors(), before, rtol=0, atol=0)
    assert not is_exact(layer, x)
    assert layer.diagonal_updates.tolist() == [3]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_the_tensors_of_every_rule_follow_copies_and_moves(make, x):
    layer = sf.GRU(3, 8, feedback="fitted")
    gradients(layer, x)
    fit = layer.diagonal
    layer.feedback = "calibrated"
    gradients(layer, x)
    other = make(layer).double()
    gradients(layer, x)  # has no effect on the copy
    assert [t["diagonal_updates"].tolist() for t in other.learned_by_rule().values()] == [[1], [1]]
    other.feedback = "fitted"
    assert torch.equal(other.diagonal, fit.double())
    other.reset_diagonal()
    assert not any(t.any() for tensors in other.learned_by_rule().values() for t in tensors.values())
    assert sf.restore(nn.Sequential(other))[0].__dict__.keys() == nn.GRU(3, 8).__dict__.keys()


REDUCED = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", REDUCED)
def test_a_running_mean_follows_the_weights_in_a_reduced_precision(kind, dtype, x):
    """After 100 passes a new mean has the weight 0.01, less than half a unit in the last place of bfloat16."""
    layer, x = MAKERS[kind]("calibrated").to(dtype), x[:5].to(dtype)
    for _ in range(60):  # Recurrent draws signs
        gradients(layer, x)
    target = layer.diagonal.clone()
    with torch.no_grad():
        layer.diagonal.fill_(0.9)
        layer.diagonal_updates.fill_(1000)
    for _ in range(400):
        gradients(layer, x)
    assert (layer.diagonal - target).abs().max() < 0.1


@pytest.mark.parametrize("dtype", REDUCED)
def test_learned_tensors_stay_float32_in_a_module_of_reduced_precision(dtype, x):
    layer = sf.GRU(3, 8, feedback="fitted")
    gradients(layer, x)
    layer.feedback = "calibrated"
    gradients(layer, x)
    before = copy.deepcopy(layer.learned_by_rule())
    layer.to(dtype)
    torch.testing.assert_close(layer.learned_by_rule(), before, rtol=0, atol=0)
    assert layer.to("meta").diagonal.dtype == torch.float32
    assert layer.to_empty(device="cpu").diagonal_updates.dtype == torch.int64
    assert layer.double().to(dtype).diagonal.dtype == torch.float32
    assert sf.GRU(3, 8, feedback="calibrated", dtype=torch.float64).diagonal.dtype == torch.float64
    assert sf.GRU(3, 8, feedback="calibrated", dtype=dtype).diagonal.dtype == torch.float32


@pytest.mark.parametrize("rule", ["calibrated", "fitted", "calibrated+1"])
@pytest.mark.parametrize("kind", [*MAKERS, "lstm", "projected"])
@pytest.mark.parametrize("dtype", REDUCED)
def test_every_layer_of_reduced_precision_trains_under_a_learned_rule(rule, kind, dtype, x):
    more = {
        "lstm": lambda rule: sf.LSTM(3, 8, feedback=rule),
        "projected": lambda r: sf.LSTM(3, 8, proj_size=4, feedback=r),
    }
    full = {**MAKERS, **more}[kind](rule)
    layer = copy.deepcopy(full).to(dtype)
    for _ in range(2):  # the first pass of "fitted" is exact
        torch.manual_seed(1)
        expected = gradients(full, x)
        torch.manual_seed(1)
        found = gradients(layer, x.to(dtype))
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f.float(), e, rtol=0, atol=0.1 * float(e.abs().max()))


@pytest.mark.parametrize("rule", ["calibrated", "fitted"])
def test_a_layer_from_the_meta_device_learns_from_zeros(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sf.GRU(3, 4, device="meta", feedback=rule)
    layer.feedback = "calibrated" if rule == "fitted" else "fitted"  # the tensors of both, current and stored
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.full_like(tensor, 7, **options))
    layer.to_empty(device="cpu")
    assert (layer.weight_hh_l0 == 7).all()
    for tensors in layer.learned_by_rule().values():
        assert all((tensor == 0).all() for tensor in tensors.values())
