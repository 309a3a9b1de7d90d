"""LSTM with ``proj_size``: what the tests of all cells do not cover, against torch.nn.LSTM."""

import copy

import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import statefeed as sf
from statefeed import native

pytestmark = pytest.mark.filterwarnings("ignore:the initial state")

RULES = ["bptt", "torch", "dsf", "gate", "jacobian", "calibrated", "fitted", "log_spaced(10)", "ft-bptt", "jacobian+1"]


def layers(feedback="bptt", **options):
    """torch's layer and ours, with the same weights."""
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 3} | options
    torch.manual_seed(0)
    theirs = nn.LSTM(4, 6, **options)
    ours = sf.LSTM(4, 6, **options, feedback=feedback)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_no_rule_changes_the_outputs(rule):
    theirs, ours = layers(rule, dtype=torch.float64)
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    (y, (h, c)), (expected, (h_n, c_n)) = ours(x), theirs(x)
    assert_same({"y": y, "h": h, "c": c}, {"y": expected, "h": h_n, "c": c_n})
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    if ours.feedback.learned:
        assert ours.diagonal.shape == (4, 3 + 6)
        assert ours.diagonal.any()


@pytest.mark.parametrize("rule", ["bptt", "dsf"])
@pytest.mark.parametrize("form", ["padded", "one length", "packed"])
@pytest.mark.parametrize("state", ["none", "float32", "bfloat16"])
def test_dtypes_under_autocast_are_torchs(rule, form, state):
    theirs, ours = layers(rule)
    x = torch.randn(5, 3, 4)
    if form != "padded":
        x = pack_padded_sequence(x, [5, 5, 5] if form == "one length" else [5, 3, 1])
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(state)
    hx = None if dtype is None else (torch.zeros(4, 3, 3, dtype=dtype), torch.zeros(4, 3, 6, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        (y, (h, c)), (expected, (h_n, c_n)) = ours(x, hx), theirs(x, hx)
    y, expected = (v if isinstance(v, torch.Tensor) else v.data for v in (y, expected))
    assert [v.dtype for v in (y, h, c)] == [v.dtype for v in (expected, h_n, c_n)]
    assert_same({"y": y, "h": h, "c": c}, {"y": expected, "h": h_n, "c": c_n}, 0.05)


def test_resets_and_lengths_are_separate_sequences():
    _, ours = layers("gate+1", bidirectional=False, dtype=torch.float64)
    x, resets = torch.randn(6, 2, 4, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.bool)
    resets[2, 0] = True
    y, (h, c) = ours(x, resets=resets, lengths=torch.tensor([6, 4]))
    first, (h_first, c_first) = ours(x[2:, :1])
    assert_same({"y": y[2:, :1], "h": h[:, :1], "c": c[:, :1]}, {"y": first, "h": h_first, "c": c_first})
    assert_same({"y": y[:2, :1]}, {"y": ours(x[:2, :1])[0]})
    assert_same({"y": y[:4, 1:]}, {"y": ours(x[:4, 1:])[0]})
    assert not y[4:, 1].any()


def test_steps_of_a_stream_are_one_call():
    _, ours = layers(bidirectional=False, dtype=torch.float64)
    x, state, outputs = torch.randn(5, 2, 4, dtype=torch.float64), None, []
    for x_t in x:
        y, state = ours.step(x_t, state)
        outputs.append(y)
    expected, (h, c) = ours(x)
    assert_same({"y": torch.stack(outputs), "h": state[0], "c": state[1]}, {"y": expected, "h": h, "c": c})


def test_newton_is_the_sequential_forward_pass():
    theirs, ours = layers("gate", dtype=torch.float64)
    x = torch.randn(40, 3, 4, dtype=torch.float64)
    ours.forward_method = "newton(1e-9)"
    (y, (h, c)), (expected, (h_n, c_n)) = ours(x), theirs(x)
    assert_same({"y": y, "h": h, "c": c}, {"y": expected, "h": h_n, "c": c_n}, 1e-8)
    assert len(ours.newton_iterations) == 4
    assert max(ours.newton_iterations) < 40


@pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")
@pytest.mark.parametrize("rule", ["bptt", "dsf", "gate+2", "jacobian", "jacobian+2"])
def test_explain_counts_the_products(rule):
    _, ours = layers(rule)
    x = torch.randn(30, 3, 4, requires_grad=True)
    found = sf.explain(ours, x)
    with FlopCounterMode(display=False) as forward:
        y, _ = ours(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert found.forward_flops == forward.get_total_flops()
    assert found.backward_flops == backward.get_total_flops()


@pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")
def test_the_table_of_paths_has_projected_layers():
    """oneDNN does not run them, so that torch's own layer is faster for a few short sequences alone."""
    layer = sf.LSTM(64, 64, proj_size=32)
    for shape, in_torch in (((1, 16, 64), True), ((3, 1, 64), True), ((8, 16, 64), False), ((64, 32, 64), False)):
        found = sf.explain(layer, torch.zeros(shape))
        assert ("torch.nn" in found.forward) == in_torch
        assert "oneDNN" not in found.why


def test_swap_and_restore_keep_the_weights():
    model = nn.Sequential(nn.LSTM(4, 6, proj_size=2))
    before = copy.deepcopy(model.state_dict())
    sf.swap(model, "dsf")
    assert type(model[0]) is sf.LSTM
    assert type(sf.restore(model)[0]) is nn.LSTM
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_alignment_of_a_projected_layer():
    _, ours = layers("dsf")
    x = torch.randn(20, 3, 4)
    found = sf.alignment(ours, lambda model, x: model(x)[0].square().mean(), x, lags=5)
    assert 0 < found.total.cosine < 1
    assert len(found.lags[""].agreement) == 5


def test_a_state_of_the_wrong_width_is_torchs_error():
    theirs, ours = layers()
    x, h, c = torch.zeros(5, 2, 4), torch.zeros(4, 2, 3), torch.zeros(4, 2, 6)
    for hx in ((c, c), (h, h)):
        for layer in (theirs, ours):
            with pytest.raises(RuntimeError, match="Expected hidden"):
                layer(x, hx)
    with pytest.raises(ValueError, match=r"9 here .*got \(12,\)"):
        ours.feedback = torch.ones(12)
