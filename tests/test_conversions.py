"""Layers of other packages that swap converts, with a stand-in for the xlstm package's cell; see also tests/interop."""

import contextlib
import copy
import pickle
from types import SimpleNamespace

import pytest
import tables
import torch
from tolerances import assert_as_accurate, assert_same
from torch import nn

import statefeed as sf
from statefeed import native
from statefeed.backends import BACKENDS, Problem, Upstream
from statefeed.cells import CELLS
from statefeed.conversions import CONVERSIONS
from statefeed.conversions.xlstm import XLSTMCell
from statefeed.feedback import EXACT, KernelRule
from statefeed.layout import Layout

B, T, H, HEADS = 2, 5, 4, 2


class Cell(nn.Module):
    """The parameters and the call of the package's sLSTM cell with the vanilla backend, computed by SLSTM."""

    def __init__(self, **options):
        super().__init__()
        self.config = SimpleNamespace(
            **{"hidden_size": H, "num_heads": HEADS, "function": "slstm", "input_shape": "BSGNH"} | options
        )
        self._recurrent_kernel_ = nn.Parameter(torch.randn(HEADS, 4 * H // HEADS, H // HEADS, dtype=torch.float64))
        self._bias_ = nn.Parameter(torch.randn(4 * H, dtype=torch.float64))

    def _recurrent_kernel_int2ext(self, kernel):
        return kernel.reshape(HEADS, 4, H // HEADS, H // HEADS).permute(0, 3, 1, 2)

    def _bias_int2ext(self, bias):
        return bias.reshape(4, HEADS, -1).permute(1, 0, 2)

    def _permute_output(self, y):
        return y.view(*y.shape[:2], HEADS, -1).permute(1, 2, 0, 3)

    def forward(self, input, state=None):
        layer = sf.SLSTM(4 * H, H, num_heads=HEADS, dtype=torch.float64)
        width = H // HEADS
        weights = {
            "weight_ih_l0": torch.eye(4 * H, dtype=torch.float64),
            "weight_hh_l0": self._recurrent_kernel_.view(HEADS, 4, width, width).transpose(0, 1).reshape(4 * H, width),
            "bias_ih_l0": self._bias_,
            "bias_hh_l0": torch.zeros(4 * H, dtype=torch.float64),
        }
        hx = None if state is None else tuple(s[None] for s in state)
        y, final = torch.func.functional_call(layer, weights, (input.transpose(0, 1), hx))
        return self._permute_output(y), torch.cat(final)

    def __repr__(self):
        return f"Cell(hidden_size={H})"


@pytest.fixture(params=["first", "reference"])
def backend(request):
    """The first backend that supports the layer, or the reference."""
    with tables.only("reference") if request.param == "reference" else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(CONVERSIONS, f"{Cell.__module__}.Cell", XLSTMCell)


def cell(**options):
    torch.manual_seed(0)
    return Cell(**options)


def results(module):
    x = torch.randn(B, T, 4 * H, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    state = torch.rand(4, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    module.zero_grad()
    y, final = module(x, state)
    (y.square().sum() + final[:3].square().sum()).backward()
    return {"y": y, "final": final, "x": x.grad, "state": state.grad} | {
        n: p.grad for n, p in module.named_parameters()
    }


@pytest.mark.parametrize("rule", ["bptt", "dsf", "gate+1", "calibrated", "jacobian", f"0.5+{T}"])
def test_a_swapped_cell_follows_its_rule_and_is_restored(rule, backend):
    module = cell()
    expected = results(module)
    report = sf.swap(module, rule)
    assert report.swapped == {"": f"Cell(hidden_size=4, feedback='{rule}')"}
    found = results(module)
    assert_same({"y": found["y"], "final": found["final"]}, {"y": expected["y"], "final": expected["final"]})
    exact = rule == "bptt" or "+5" in rule
    if exact:
        assert_same(found, expected, 1e-9)
    else:
        assert not torch.allclose(found["_recurrent_kernel_"], expected["_recurrent_kernel_"], rtol=1e-2)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module, 0))):
        assert str(other.feedback) == rule
        assert isinstance(other, Cell)
        assert_same({"y": results(other)["y"]}, {"y": expected["y"]})
    assert list(module.state_dict()) == ["_recurrent_kernel_", "_bias_"]
    assert type(sf.restore(module)) is Cell
    assert_same(results(module), expected)


def test_a_dry_run_reports_what_a_swap_does():
    module = cell()
    assert sf.swap(module, "gate", dry_run=True) == sf.swap(cell(), "gate")
    assert type(module) is Cell
    assert sf.swap(nn.Sequential(cell(), nn.GRU(2, 3)), exclude="1").kept == {"1": "excluded"}


def test_reasons_not_to_convert():
    for options, reason in (
        ({"function": "lstm"}, "converts the function 'slstm' of the cell, got 'lstm'"),
        ({"gradient_recurrent_cut": True}, "no gradient_recurrent_cut: it must be False, got True"),
        ({"forward_clipval": 3.0}, "no forward_clipval: it must be None, got 3.0"),
    ):
        with pytest.warns(UserWarning, match="swap changed nothing"):
            assert reason in sf.swap(cell(**options)).kept[""]
    module = cell()
    with pytest.warns(UserWarning, match='needs a layer of torch.nn, which has no Cell: use "bptt"'):
        sf.swap(module, "torch")
    sf.swap(module)
    with pytest.raises(ValueError, match=r"4 \* hidden_size = 16 features, got \(2, 5, 3\)"):
        module(torch.zeros(B, T, 3))


def test_resumed_sequences_and_other_input_shapes():
    module = cell()
    sf.swap(module)
    x = torch.randn(B, T, 4 * H, dtype=torch.float64)
    y, final = module(x)
    first, state = module(x[:, :2])
    rest, last = module(x[:, 2:], state)
    assert_same({"y": torch.cat([first, rest], 2), "final": last}, {"y": y, "final": final})
    time_first = cell(input_shape="SBGNH")
    sf.swap(time_first)
    assert_same({"y": time_first(x.transpose(0, 1))[0]}, {"y": y})


# Layers without W_ih --------------------------------------------------------------------------------------------------


def of_a_backend(name, cell, rule, dtype, ragged, identity):
    """Outputs and gradients of one layer whose x are the preactivations, or are multiplied by the identity."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(0)
    G, sizes = CELLS[cell].gates * H, torch.tensor([3, 3, 2, 2, 1])
    N = int(sizes.sum())
    state = tuple(random(3, H).abs() + 0.5 for _ in CELLS[cell].states)
    weights = (random(G, H // HEADS if "slstm" in cell else H), random(G), random(G))
    layout = Layout(5, 3, sizes) if ragged else Layout(N, 1)
    if not ragged:
        state = tuple(s[:1] for s in state)
    w_ih = torch.eye(G, dtype=dtype) if identity else torch.empty(0, dtype=dtype)
    problem = Problem(CELLS[cell], random(N, G), state, (w_ih, *weights), layout, True)
    backend = BACKENDS[name]
    (done,) = backend.forward([problem], True)
    upstream = Upstream(random(N, H), tuple(random(*s.shape) for s in state[: CELLS[cell].gradient_parts]))
    found = backend.backward(problem, backend.recompute(problem, done), upstream, rule, True)
    assert found.weights[0].shape == w_ih.shape
    gradients = [found.x, *found.state, *found.weights[1:]]
    return {str(n): value for n, value in enumerate([done.y, *done.final, *gradients])}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("rule", [EXACT, KernelRule("jacobian"), KernelRule("jacobian", None, 2)], ids=str)
@pytest.mark.parametrize(
    ("name", "cell"),
    # The reference runs torch's cells forward through torch, which has input weights.
    [("reference", "slstm"), *(("cpu", cell) for cell in ("slstm", "slstm_exp", "lstm", "gru", "rnn_tanh"))],
)
def test_a_layer_without_input_weights_is_one_with_the_identity(name, cell, rule, ragged):
    if name == "cpu" and native.unavailable("cpu"):
        pytest.skip(native.unavailable("cpu"))
    exact = of_a_backend(name, cell, rule, torch.float64, ragged, True)
    assert_same(of_a_backend(name, cell, rule, torch.float64, ragged, False), exact)
    single = (of_a_backend(name, cell, rule, torch.float32, ragged, identity) for identity in (False, True))
    assert_as_accurate(*single, exact)
