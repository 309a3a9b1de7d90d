"""Faults that users of recurrent layers report, each with the right value or the right sentence."""

import ast
import copy
import importlib
import pickle
import random
import warnings
from collections import deque
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils._device import _device_constructors
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import statefeed as sf
from statefeed.cell_layer import CellLayer
from statefeed.cells import CELLS

LAYERS = {"rnn": sf.RNN, "gru": sf.GRU, "lstm": sf.LSTM}
TORCHS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
APPROXIMATE = ["dsf", "ft-bptt", "calibrated", "fitted", "jacobian", "dsf+1", 0.5]
pytestmark = pytest.mark.filterwarnings(
    "ignore:feedback .* adds corrections",
    "ignore:the initial state",
    "ignore:.torch.jit.script. is deprecated",  # torch's own in forward mode
    "ignore:There is a performance drop",  # likewise in torch.func
)

every_layer = pytest.mark.parametrize("cell", LAYERS)


class Tanh(CellLayer):
    cell = CELLS["rnn_tanh"]


class Minimal(CellLayer):
    """A layer of a cell that torch lacks."""

    cell = copy.copy(CELLS["gru"])
    cell.torch_forward = None


@pytest.fixture
def x():
    return torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))


def total(layer, x):
    return layer(x)[0].square().sum()


# Complex numbers ------------------------------------------------------------------------------------------------------

COMPLEX = r"^feedback \"[^\"]+\" is defined for real numbers, got torch.complex\d+: set feedback to \"torch\"$"
beta = pytest.mark.filterwarnings("ignore:Complex modules are a new feature")


@beta
@pytest.mark.parametrize("rule", APPROXIMATE)
@every_layer
def test_an_approximate_rule_raises_for_every_complex_layer(cell, rule, x):
    with pytest.raises(ValueError, match=COMPLEX):
        LAYERS[cell](3, 4, dtype=torch.cdouble, feedback=rule)
    with pytest.raises(ValueError, match=COMPLEX):
        LAYERS[cell](3, 4, feedback=rule).to(torch.cfloat)
    exact = LAYERS[cell](3, 4, dtype=torch.cfloat)
    with pytest.raises(ValueError, match=COMPLEX):
        exact.feedback = rule
    with pytest.raises(ValueError, match=COMPLEX):
        sf.Schedule(rule).apply(exact, 0.0)
    plain = nn.Sequential(TORCHS[cell](3, 4, dtype=torch.cfloat))
    with pytest.warns(UserWarning, match="swap changed nothing"):
        report = sf.swap(plain, feedback=rule)
    assert report.kept["0"].endswith('set feedback to "torch"')
    assert type(plain[0]) is TORCHS[cell]


@beta
@pytest.mark.parametrize("dtype", [torch.cfloat, torch.cdouble])
@pytest.mark.parametrize(
    "layer", [sf.LSTM(3, 4, feedback="calibrated"), Minimal(3, 4), sf.Recurrent(nn.GRUCell(3, 4), "calibrated")]
)
def test_a_layer_that_raises_for_complex_numbers_is_unchanged(layer, dtype, x):
    expected = layer(x)[0]
    expected.sum().backward()
    with pytest.raises(ValueError, match=r"is defined for real numbers, got torch\.complex"):
        layer.to(dtype)
    assert torch.equal(layer(x)[0], expected)
    assert {t.dtype for p in layer.parameters() for t in (p, p.grad)} == {torch.float32}
    layer(x)[0].sum().backward()


@beta
def test_newton_raises_for_complex_numbers_with_a_remedy_that_works():
    layer, message = (
        sf.GRU(3, 4, dtype=torch.cfloat),
        r"newton.* is defined for real numbers, got torch.complex64: set ",
    )
    with pytest.raises(ValueError, match=message + 'forward_method to "sequential"'):
        layer.forward_method = "newton"
    layer.feedback = "torch"
    layer.forward_method = "sequential"
    other = sf.GRU(3, 4, feedback="dsf")
    other.forward_method = "newton"
    with pytest.raises(ValueError, match=message + 'forward_method to "sequential"'):
        other.to(torch.cfloat)
    assert other.weight_hh_l0.dtype == torch.float32
    other.forward_method, other.feedback = "sequential", "torch"
    assert other.to(torch.cfloat).weight_hh_l0.dtype == torch.cfloat
    third = Minimal(3, 4)
    third.forward_method = "newton"
    with pytest.raises(ValueError, match=r"^Minimal is defined for real numbers, got torch.complex64$"):
        third.to(torch.cfloat)


@beta
@every_layer
@pytest.mark.parametrize("rule", ["bptt", "torch"])
def test_exact_rules_have_the_gradient_of_torch_on_complex_numbers(cell, rule):
    torch.manual_seed(0)
    ours = LAYERS[cell](3, 4, feedback=rule).to(torch.cdouble)
    other = TORCHS[cell](3, 4, dtype=torch.cdouble)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.cdouble)
    for layer in (ours, other):
        layer(x)[0].abs().square().sum().backward()
    for p, q in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@beta
def test_cells_outside_torch_raise_for_complex_numbers():
    with pytest.raises(ValueError, match=r"^Minimal is defined for real numbers, got torch.complex64$"):
        Minimal(3, 4, dtype=torch.cfloat)
    with pytest.raises(ValueError, match=r"^Minimal is defined for real numbers"):
        Minimal(3, 4).to(torch.cfloat)
    cell = nn.GRUCell(3, 4)
    with pytest.raises(ValueError, match=COMPLEX):
        sf.Recurrent(copy.deepcopy(cell).to(torch.cfloat), "dsf")
    with pytest.raises(ValueError, match=COMPLEX):
        sf.Recurrent(cell, "jacobian")(torch.zeros(2, 1, 3), torch.zeros(1, 4, dtype=torch.cfloat))


def test_alignment_counts_real_and_imaginary_parts_of_a_complex_head(x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight = sf.GRU(3, 4, feedback="ft-bptt"), nn.Parameter(torch.randn(4) * 1j)

        def forward(self, x):
            return (self.layer(x)[0] * self.weight).abs().square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sf.alignment(Model(), lambda model, x: model(x), x).parameters["weight"].cosine == pytest.approx(1)


@beta
@pytest.mark.parametrize("kind", [*LAYERS.values(), lambda *sizes, dtype: sf.Recurrent(nn.GRUCell(*sizes).to(dtype))])
def test_diagnostics_take_complex_layers(kind):
    layer, x = kind(3, 4, dtype=torch.cdouble), torch.randn(5, 2, 3, dtype=torch.cdouble)
    found = sf.alignment(layer, lambda m, x: m(x)[0].abs().square().sum(), x, lags=3)
    assert [found.total.cosine, *(lag.cosine for lag in found.lags[""].agreement)] == pytest.approx([1.0] * 4)
    if isinstance(layer, nn.RNNBase):
        assert sf.explain(layer, x).forward == "torch.nn's own path"


# The default device ---------------------------------------------------------------------------------------------------

_FACTORIES = {factory.__name__ for factory in _device_constructors()}


def without_device(source):
    """Lines that make a tensor on whatever the default device is."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in _FACTORIES) == ("torch", True)
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]


def test_every_tensor_of_the_library_names_its_device():
    assert without_device("torch.zeros(3)\nx.new_zeros(3)\ntorch.ones(3, device='cpu')") == [1]
    package = Path(sf.__file__).parent
    files = list(package.rglob("*.py"))
    assert len(files) > 120
    found = {file.relative_to(package).as_posix(): without_device(file.read_text()) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rule", ["bptt", "torch", *APPROXIMATE])
@every_layer
def test_results_do_not_depend_on_the_default_device(cell, rule, bidirectional):
    def results():
        layer = LAYERS[cell](3, 4, bidirectional=bidirectional, feedback=rule, device="cpu")
        with torch.no_grad():
            for weight in layer.parameters():
                weight.fill_(0.1)
        x = torch.linspace(-1, 1, 30, device="cpu").view(5, 2, 3).requires_grad_()
        lengths, resets = torch.tensor([5, 3], device="cpu"), torch.zeros(5, 2, dtype=torch.bool, device="cpu")
        outputs = [
            layer(x)[0],
            layer(x, lengths=lengths)[0],
            layer(x, resets=resets)[0],
            layer(pack_padded_sequence(x, lengths))[0].data,
        ]
        sum(y.sum() for y in outputs).backward()
        alignment = sf.alignment(layer, total, x.detach(), lags=2).total
        return [*outputs, x.grad, *(p.grad for p in layer.parameters())], alignment

    expected = results()
    torch.set_default_device("meta")
    try:
        found = results()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1] == expected[1]


def test_a_diagonal_without_values_raises():
    with pytest.raises(ValueError, match=r'^a feedback diagonal must have values, got a tensor on the device "meta"'):
        sf.GRU(3, 4, feedback=torch.linspace(0, 1, 4, device="meta"))


# Dtypes under autocast ------------------------------------------------------------------------------------------------


def dtypes_under_autocast(layer, x, hx, lengths, grad):
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y, state = layer(x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths)), hx)
        y = y if lengths is None else y.data
        if grad:
            y.float().sum().backward()
            assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    return [y.dtype, *(s.dtype for s in (state if isinstance(state, tuple) else (state,)))]


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="torch lacks the LSTM of this CPU in bf16")
@pytest.mark.parametrize("rule", ["dsf", "bptt", "torch"])
@pytest.mark.parametrize("layers", [1, 2])
@every_layer
def test_autocast_returns_the_dtypes_of_torch(cell, layers, rule, x):
    for dtype, state, lengths, grad in product(
        (torch.float32, torch.bfloat16), (None, torch.float32, torch.bfloat16), (None, (5, 3), (5, 5)), (False, True)
    ):
        hx = None if state is None else torch.zeros(2 * layers, 2, 4, dtype=state)
        hx = (hx, hx) if cell == "lstm" and hx is not None else hx
        found, expected = (
            dtypes_under_autocast(layer, x.to(dtype), hx, lengths, grad)
            for layer in (
                LAYERS[cell](3, 4, layers, bidirectional=True, feedback=rule),
                TORCHS[cell](3, 4, layers, bidirectional=True),
            )
        )
        assert found == expected, (dtype, state, lengths, grad)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="torch lacks the LSTM of this CPU in bf16")
@pytest.mark.parametrize("rule", ["dsf", "bptt", "torch"])
@every_layer
def test_lengths_and_resets_change_no_dtype(cell, rule, x):
    layer = LAYERS[cell](3, 4, feedback=rule)
    resets = torch.zeros(5, 2, dtype=torch.bool)
    rows = [{"lengths": torch.tensor([5, 3])}, {"lengths": torch.tensor([5, 5])}, {"resets": resets}]
    rows += [{"resets": resets.index_fill(0, torch.tensor([2]), True)}, {"resets": ~resets}]
    for grad, options in product((False, True), rows):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            (y, state), (expected, final) = layer(x, **options), layer(x)
        flat = [y, *(state if cell == "lstm" else [state])]
        assert [t.dtype for t in flat] == [t.dtype for t in (expected, *(final if cell == "lstm" else [final]))]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_lstm_is_validated_under_autocast_where_onednn_has_no_bfloat16(dtype, layers, x, monkeypatch):
    layer = sf.LSTM(3, 4, layers, feedback="torch")
    with torch.no_grad():
        expected, (h, c) = layer(x.to(dtype).float())
        monkeypatch.setattr("statefeed.paths.onednn_supports_bf16", lambda: False)
        for hx in (None, (torch.zeros(layers, 2, 4), torch.zeros(layers, 2, 4))):
            with torch.autocast("cpu", torch.bfloat16):
                y, state = layer(x.to(dtype), hx)
            torch.testing.assert_close([y, *state], [expected.bfloat16(), h.bfloat16(), c.bfloat16()], rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            packed = layer(pack_padded_sequence(x.to(dtype), torch.tensor([5, 5])))[0]
        torch.testing.assert_close(packed.data, expected.bfloat16().flatten(0, 1), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert y.dtype == layer(x)[0].dtype
        layer.feedback = "bptt"
        layer(x[:1])[0].sum().backward()  # one step: torch's own path
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("feature", ["lengths", "resets"])
def test_a_linear_layer_feeds_a_gru_under_autocast(feature, x):
    options = {"lengths": torch.tensor([5, 3])} if feature == "lengths" else {"resets": torch.zeros(5, 2).bool()}
    model, layer = nn.Linear(3, 3), sf.GRU(3, 4, feedback="dsf")
    with torch.autocast("cpu", torch.bfloat16):
        y, h = layer(model(x), **options)
        mask = torch.zeros(5, 2, 4, dtype=torch.bool)
        y = y.masked_scatter(mask, model(x))
    assert y.dtype == h.dtype == torch.bfloat16


# An overridden forward ------------------------------------------------------------------------------------------------


class Doubled(sf.GRU):
    def forward(self, *arguments, **options):
        y, h = super().forward(*arguments, **options)
        return 2 * y, h


class DoubledCell(Minimal):
    def forward(self, *arguments, **options):
        y, h = super().forward(*arguments, **options)
        return 2 * y, h


@pytest.mark.parametrize(("kind", "plain"), [(Doubled, sf.GRU), (DoubledCell, Minimal)])
def test_an_overridden_forward_runs_once(kind, plain, x):
    ours, other = kind(3, 4, feedback="dsf"), plain(3, 4, feedback="dsf")
    other.load_state_dict(ours.state_dict())
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    for options in ({}, {"lengths": torch.tensor([5, 3])}, {"resets": torch.zeros(5, 2, dtype=torch.bool)}):
        torch.testing.assert_close(ours(x, **options)[0], 2 * other(x, **options)[0])
    torch.testing.assert_close(ours.step(x[0])[0], 2 * other.step(x[0])[0])
    assert len(calls) == 4


def test_alignment_measures_a_layer_with_an_overridden_forward(x):
    class Last(sf.GRU):
        """Another input and another result than a recurrent layer has."""

        def __init__(self):
            super().__init__(3, 4, feedback="ft-bptt")

        def forward(self, x):
            return super().forward(x[..., :3])[0][-1]

    found = sf.alignment(Last(), lambda model, x: model(x).sum(), torch.cat([x, x], -1))
    assert found.total.cosine < 1
    assert found.lags == {}


# Diagnostics ----------------------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Keeps its state in attributes, in a buffer that is replaced, and in containers."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = sf.GRU(3, 4, feedback="ft-bptt"), nn.Linear(4, 1)
        self.h, self.log, self.cache, self.recent = torch.zeros(1, 2, 4), [], {}, deque(maxlen=3)
        self.counted = torch.zeros(())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        y, h = self.layer(x, self.h)
        self.h, self.seen = h.detach(), self.seen + 1
        self.counted += 1
        self.log.append(float(self.counted))
        self.recent.append(1)
        self.cache["h"] = self.h
        self.added = True
        return self.head(y).square().sum()


def test_alignment_starts_both_passes_from_one_hidden_state_and_restores_it(x):
    torch.manual_seed(0)
    model = Stateful()
    model(x)
    model.__dict__.pop("added")
    before, names = copy.deepcopy(model), set(vars(model))
    starts = []

    def loss(model, x):
        starts.append(model.h.clone())
        return model(x)

    found = sf.alignment(model, loss, x, lags=0)
    assert torch.equal(*starts)
    assert set(vars(model)) == names
    for name in ("h", "log", "recent", "counted"):
        assert str(getattr(model, name)) == str(getattr(before, name))
    assert torch.equal(model.cache["h"], before.cache["h"])
    assert torch.equal(model.seen, before.seen)
    # The right value: both gradients by hand, from that state.
    grads = []
    for rule in ("ft-bptt", "torch"):
        one = copy.deepcopy(before)
        one.layer.feedback = rule
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(one(x), list(one.parameters()))]).double())
    assert found.total.cosine == pytest.approx(float(torch.cosine_similarity(*grads, dim=0)), abs=1e-6)
    assert found.total.cosine < 0.9999


def test_alignment_of_a_loss_that_is_not_finite_is_not_a_number(x):
    found = sf.alignment(sf.GRU(3, 4, feedback="dsf"), lambda m, x: total(m, x) * float("nan"), x, lags=0)
    assert all(value != value for value in found.numbers().values())


def through_head(model, y):
    return model["head"](y).square().sum()


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, x: through_head(m, m["layer"](x)[0].detach()),
        lambda m, x: through_head(m, torch.no_grad()(m["layer"])(x)[0]),
        lambda m, x: through_head(m, torch.cat([x, x[..., :1]], -1)),
    ],
    ids=["detached", "without autograd", "unused"],
)
def test_alignment_needs_a_gradient_that_passes_through_a_layer(loss, x):
    model = nn.ModuleDict({"layer": sf.GRU(3, 4, feedback="ft-bptt"), "head": nn.Linear(4, 1)})
    with pytest.raises(ValueError, match=r"^alignment needs a loss whose gradient passes through a statefeed layer"):
        sf.alignment(model, loss, x)
    assert sf.alignment(model, lambda m, x: through_head(m, m["layer"](x)[1]), x).total.cosine < 1


def test_alignment_of_a_frozen_layer_that_a_gradient_passes(x):
    model = nn.ModuleDict({"embedding": nn.Linear(3, 3), "layer": sf.GRU(3, 4, feedback="ft-bptt")})
    model["layer"].requires_grad_(False)
    assert sf.alignment(model, lambda m, x: m["layer"](m["embedding"](x))[0].square().sum(), x).total.cosine < 1
    model["embedding"].requires_grad_(False)
    model["head"] = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="got a loss without one"):
        sf.alignment(model, lambda m, x: through_head(m, m["layer"](x)[0]), x)


def test_both_passes_of_alignment_draw_the_same_random_numbers(x):
    np = pytest.importorskip("numpy")
    layer = sf.GRU(3, 4, feedback="torch")
    layer.generator = torch.Generator().manual_seed(0)

    def loss(model, x):
        noise = torch.randn(x.shape, generator=model.generator)
        return total(model, x * noise) * (1 + random.random()) * (1 + np.random.rand())

    before = layer.generator.get_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = sf.alignment(layer, loss, x, lags=0).total
    assert (found.cosine, found.norm_ratio) == pytest.approx((1, 1))
    assert torch.equal(layer.generator.get_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_alignment_warns_of_a_state_that_it_cannot_restore(x):
    layer, calls = sf.GRU(3, 4, feedback="torch"), []

    def loss(model, x):
        calls.append(1)
        return total(model, x) * len(calls)

    with pytest.warns(UserWarning, match=r"^alignment needs the same loss in both passes, got [^\n]+$"):
        sf.alignment(layer, loss, x)


def test_alignment_needs_a_loss_that_reaches_a_parameter(x):
    model = nn.ModuleList([sf.GRU(3, 4, feedback="dsf")])
    with pytest.raises(ValueError, match=r"^alignment needs a loss that depends on a parameter, got one that reaches"):
        sf.alignment(model, lambda m, x: x.clone().requires_grad_().sum(), x)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Tagger(nn.Module):
    def __init__(self, rule="dsf"):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = sf.GRU(3, 4, feedback=rule), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
@pytest.mark.parametrize("everything", [False, True])
def test_alignment_raises_for_sharded_parameters(everything, one_process, x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Tagger(), init_device_mesh("cpu", (1,))
    fully_shard(model.layer, mesh=mesh)
    if everything:
        fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"^alignment needs unsharded parameters, got layer.weight_ih_l0 as a DTensor"):
        sf.alignment(model, lambda m, x: m(x).square().sum(), x)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_a_distributed_model_is_measured_and_trained_on(one_process, x):
    plain = Tagger("calibrated")
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))

    def loss(model, x):
        return model(x).square().sum()

    assert sf.alignment(model, loss, x, lags=0).total == sf.alignment(plain, loss, x, lags=0).total
    sf.Schedule("dsf@0.5/calibrated+1").apply(model, 0.9)
    for _ in range(2):
        loss(model, x).backward()
    assert model.module.layer.diagonal_updates.tolist() == [2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("rule", ["calibrated+1", "fitted"])
def test_a_schedule_switches_a_sharded_model_to_a_learned_rule(rule, one_process, x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Tagger(), init_device_mesh("cpu", (1,))
    plain = copy.deepcopy(model)
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for fraction, each in product((0.1, 0.9), (model, plain)):
        sf.Schedule(f"dsf@0.5/{rule}").apply(each, fraction)
        each(x).square().sum().backward()
    assert plain.layer.diagonal.any()
    torch.testing.assert_close(model.layer.diagonal, plain.layer.diagonal)


# Parameters that a cell does not use ----------------------------------------------------------------------------------


class Idle(nn.Module):
    """A cell with a parameter that its step does not use, and an input that it does not use either."""

    hidden_size = 4

    def __init__(self):
        super().__init__()
        self.weight, self.idle = nn.Parameter(0.3 * torch.ones(4)), nn.Parameter(torch.ones(2))

    def forward(self, x, h):
        return torch.tanh(self.weight + 0.5 * h)


@pytest.mark.parametrize("rule", ["bptt", "torch", *APPROXIMATE])
def test_an_unused_parameter_of_a_cell_has_no_gradient_and_no_decay(rule, x):
    layer, leaf = sf.Recurrent(Idle(), rule), x.clone().requires_grad_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    total(layer, leaf).backward()
    optimizer.step()
    assert layer.cell.idle.grad is None
    assert leaf.grad is None
    assert torch.equal(layer.cell.idle, torch.ones(2))
    assert layer.cell.weight.grad.abs().sum() > 0


# What learned rules store ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", ["calibrated+1", "fitted"])
def test_an_average_created_before_a_schedule_switches(learned, x):
    model = Tagger()
    schedule, average = sf.Schedule(f"dsf@0.5/{learned}"), AveragedModel(model, use_buffers=True)
    for step in range(4):
        schedule.apply(model, step / 4)
        model(x).square().sum().backward()
        average.update_parameters(model)
    assert model.layer.diagonal.any()
    assert list(model.buffers()) == []
    assert torch.equal(average.module.layer.weight_hh_l0, model.layer.weight_hh_l0)


def copied(layer):
    return copy.deepcopy(layer)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("make", [copied, pickled])
@pytest.mark.parametrize("kind", [sf.GRU, Minimal, lambda *sizes, feedback: sf.Recurrent(nn.GRUCell(*sizes), feedback)])
def test_learned_tensors_follow_copies_pickles_and_dtypes(make, kind, x):
    layer = kind(3, 4, feedback="calibrated")
    if make is pickled and kind is Minimal:
        pytest.skip("a cell made here has no name to be pickled by")
    total(layer, x).backward()
    other = make(layer)
    assert torch.equal(other.diagonal, layer.diagonal)
    assert other.diagonal_updates.tolist() == [1]
    total(other, x).backward()
    assert (layer.diagonal_updates.tolist(), other.diagonal_updates.tolist()) == ([1], [2])
    layer.double()
    assert layer.diagonal.dtype == torch.float64
    assert layer.diagonal_updates.dtype == torch.int64
    assert layer.to("meta").diagonal.is_meta
    assert "diagonal" not in layer.state_dict()


def test_the_buffers_of_an_old_pickle_become_attributes(x):
    layer = sf.GRU(3, 4, feedback="calibrated")
    total(layer, x).backward()
    state = layer.__dict__.copy()
    state["_buffers"] = {name: state.pop(name) for name in ("diagonal", "diagonal_updates")}
    state["_non_persistent_buffers_set"] = set(state["_buffers"])
    old = sf.GRU.__new__(sf.GRU)
    old.__setstate__(copy.deepcopy(state))
    assert torch.equal(old.diagonal, layer.diagonal)
    assert list(old.buffers()) == []
    total(old, x).backward()
    assert old.diagonal_updates.tolist() == [2]


# A schedule -----------------------------------------------------------------------------------------------------------


def test_a_schedule_changes_every_layer_or_none():
    model = nn.Sequential(sf.GRU(3, 4, feedback="dsf"), sf.RNN(4, 4, feedback="dsf"), sf.GRU(4, 4, feedback="dsf"))
    with pytest.raises(ValueError, match="the cell 'rnn_tanh' has none"):
        sf.Schedule("gate+1").apply(model, 0.0)
    assert [str(layer.feedback) for layer in model] == ["dsf"] * 3


def test_a_schedule_changes_no_layer_if_one_does_not_support_the_rule_with_its_forward_method():
    model = nn.Sequential(sf.GRU(3, 4), sf.GRU(4, 4))
    model[1].forward_method = "newton"
    schedule = sf.Schedule("dsf@0.5/torch")
    for fraction in (0.0, 0.9):
        with pytest.raises(ValueError, match='set feedback to "bptt"'):
            schedule.apply(model, fraction)
    assert [str(layer.feedback) for layer in model] == ["bptt", "bptt"]
    report = sf.swap(model, feedback="torch")
    assert list(report.swapped) == ["0"]
    assert 'set feedback to "bptt"' in report.kept["1"]
    assert [str(layer.feedback) for layer in model] == ["torch", "bptt"]


def test_a_schedule_reads_a_tensor_rule_once(monkeypatch):
    model = nn.Sequential(sf.GRU(3, 4, feedback=torch.full((4,), 0.5)))
    schedule, reads, tolist = sf.Schedule(torch.full((4,), 0.5)), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or tolist(tensor))
    assert not schedule.apply(model, 0.0)
    once = len(reads)
    for step in range(1, 5):
        assert not schedule.apply(model, step / 5)
    assert len(reads) == once


# Transforms -----------------------------------------------------------------------------------------------------------


def output(layer):
    return lambda x: layer(x)[0].sum(0).flatten()


def batched_gradients(layer, x):
    leaf = x.clone().requires_grad_()
    y = output(layer)(leaf)
    return torch.autograd.grad(y, leaf, torch.eye(len(y)), is_grads_batched=True)[0]


def forward_mode(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(output(layer)(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def per_sample(layer, x):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    layer.batch_first = True
    return call_for_per_sample_grads(layer)(x)[0]


def second_derivative(layer, x):
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(layer, leaf), leaf, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), leaf)[0]


TRANSFORMS = {
    "jacrev": lambda layer, x: torch.func.jacrev(output(layer))(x),
    "jacobian": lambda layer, x: torch.autograd.functional.jacobian(output(layer), x, vectorize=True),
    "is_grads_batched": batched_gradients,
    "jvp": lambda layer, x: torch.func.jvp(output(layer), (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda layer, x: torch.func.jacfwd(output(layer))(x),
    "forward_ad": forward_mode,
    "vmap": lambda layer, x: torch.func.vmap(output(layer))(x[None]),
    "vmap of grad": lambda layer, x: torch.func.vmap(torch.func.grad(lambda x: total(layer, x)))(x[None]),
    "second derivative": second_derivative,
    "ExpandedWeights": per_sample,
}
SENTENCES = {
    **dict.fromkeys(
        ["jacrev", "jacobian", "is_grads_batched"], "the backward pass of a feedback rule takes one gradient"
    ),
    **dict.fromkeys(["jvp", "jacfwd", "forward_ad"], "a feedback rule has no forward-mode derivative"),
    **dict.fromkeys(["vmap", "vmap of grad"], "torch.func.vmap cannot run through a recurrent layer under a feedback"),
    "second derivative": "a feedback rule has no second derivative",
    "ExpandedWeights": r"ExpandedWeights \(call_for_per_sample_grads\) cannot run through a feedback rule",
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rule", ["dsf", "bptt", "calibrated+1"])
@every_layer
def test_an_unsupported_transform_raises_a_clear_error(cell, rule, transform, x):
    x = torch.cat([x] * 5)  # long enough for kernels under the exact rule
    with pytest.raises(RuntimeError, match=f"^{SENTENCES[transform]}[^\n]+$"):
        TRANSFORMS[transform](LAYERS[cell](3, 4, feedback=rule), x)


@pytest.mark.parametrize(
    "transform", ["jacrev", "jvp", "jacfwd", "forward_ad", "vmap", "vmap of grad", "ExpandedWeights"]
)
@every_layer
def test_the_answer_to_a_transform_does_not_depend_on_the_length(cell, transform, x):
    layer = LAYERS[cell](3, 4)
    assert "torch.nn" in sf.explain(layer, x[:2]).forward
    with pytest.raises(RuntimeError, match=f"^{SENTENCES[transform]}[^\n]+$"):
        TRANSFORMS[transform](layer, x[:2])


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_layer
def test_the_remedy_of_an_error_works(cell, transform, x):
    """Where it names "torch", that rule runs, with the values of torch's layer; where it does not, it fails as well."""
    with pytest.raises(RuntimeError) as error:
        TRANSFORMS[transform](LAYERS[cell](3, 4, feedback="dsf"), x)
    names_torch = '"torch"' in str(error.value)
    if transform == "vmap":
        names_torch = False  # the LSTM's sentence is on vmap of grad
    if transform == "ExpandedWeights":
        names_torch = cell != "lstm"
    layer, other = LAYERS[cell](3, 4, feedback="torch"), TORCHS[cell](3, 4)
    other.load_state_dict(layer.state_dict())
    if names_torch:
        found, expected = (TRANSFORMS[transform](each, x) for each in (layer, other))
        torch.testing.assert_close(found, expected)
    else:
        with pytest.raises((RuntimeError, NotImplementedError)):
            TRANSFORMS[transform](layer, x)


@pytest.mark.parametrize("transform", ["jacrev", "jacobian", "is_grads_batched", "jvp", "forward_ad", "vmap"])
def test_a_user_defined_cell_raises_a_clear_error_whose_remedy_works(transform, x):
    layer = sf.Recurrent(nn.GRUCell(3, 4), "dsf")
    with pytest.raises(
        RuntimeError, match=r'^(torch.func cannot|the backward pass of|a feedback rule has)[^\n]+"(bptt|torch)"'
    ) as error:
        TRANSFORMS[transform](layer, x)
    layer.feedback = str(error.value).split('"')[1]
    TRANSFORMS[transform](layer, x)


class Plain(nn.Module):
    """A cell of layers that take ExpandedWeights."""

    hidden_size = 4

    def __init__(self):
        super().__init__()
        self.input, self.hidden = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x, h):
        return torch.tanh(self.input(x) + self.hidden(h))


def test_expanded_weights_run_through_a_user_defined_cell_under_the_exact_rule(x):
    layer = sf.Recurrent(Plain(), "dsf")
    with pytest.raises(RuntimeError, match=r"^ExpandedWeights [^\n]+ statefeed.Recurrent [^\n]+\"bptt\"[^\n]+$"):
        per_sample(layer, x)
    layer.feedback = "bptt"
    per_sample(layer, x.transpose(0, 1)).square().sum().backward()
    found = [p.grad_sample for p in layer.parameters()]
    for k in range(2):
        expected = torch.autograd.grad(total(layer, x.transpose(0, 1)[k : k + 1]), list(layer.parameters()))
        torch.testing.assert_close([g[k] for g in found], list(expected))


# Tools that look at graphs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [sf.GRU(3, 4, feedback="dsf"), sf.LSTM(3, 4), Minimal(3, 4), sf.Recurrent(nn.GRUCell(3, 4), "dsf")]
)
def test_fx_traces_a_module_that_holds_a_layer(layer, x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(4, 1)

        def forward(self, x):
            y, state = self.layer(x)
            y, _ = self.layer(x[..., :3], state)
            return self.head(y)

    model = Model()
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layer", "layer", "head"]
    torch.testing.assert_close(graph(x), model(x))


def test_fx_records_lengths_by_name(x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = sf.GRU(3, 4)

        def forward(self, x, lengths):
            return self.layer(x, lengths=lengths)[0]

    model, lengths = Model(), torch.tensor([5, 3])
    torch.testing.assert_close(fx.symbolic_trace(model)(x, lengths), model(x, lengths))


def test_fx_raises_for_a_module_that_it_cannot_trace():
    with pytest.raises(
        RuntimeError,
        match=r"^torch.fx cannot trace Doubled, a subclass of a recurrent layer that overrides forward[^\n]+$",
    ):
        fx.symbolic_trace(nn.Sequential(Doubled(3, 4)))
    with pytest.raises(RuntimeError, match=r"^torch.fx traces a module that holds a recurrent layer, not GRU itself$"):
        fx.symbolic_trace(sf.GRU(3, 4))


@pytest.mark.parametrize("rule", ["bptt", "dsf", "calibrated", "jacobian", "gate+2"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_products_are_counted_as_explain_counts_them(cell, rule, x):
    layer, leaf = LAYERS[cell](3, 4, feedback=rule), torch.cat([x] * 5).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        total(layer, leaf).backward()
    expected = sf.explain(layer, leaf)
    assert counter.get_total_flops() == expected.forward_flops + expected.backward_flops


def test_a_counter_that_runs_when_the_kernels_are_loaded_counts_them():
    from statefeed.native.flop_table import register

    operator = torch.ops.aten.erfinv
    with FlopCounterMode(display=False) as counter:
        register(operator, lambda shape, **_: shape[0])
        torch.erfinv(torch.zeros(7))
    assert counter.get_total_flops() == 7


def test_the_operators_of_a_gpu_are_counted():
    pytest.importorskip("triton")
    from torch._subclasses import FakeTensorMode

    importlib.import_module("statefeed.backends.triton.operators")
    rows, inputs, H, k = 10, 3, 4, 2
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, y, state = torch.empty(rows, inputs), torch.empty(rows, H), [torch.empty(2, H)]
        weights = [torch.empty(3 * H, inputs), torch.empty(3 * H, H), torch.empty(3 * H), torch.empty(3 * H)]
        saved = torch.ops.statefeed.triton_recompute("gru", x, y, state, weights, None, False, "ieee")
        gates = 2 * rows * 3 * H
        assert counter.get_total_flops() == gates * (inputs + H)
        torch.ops.statefeed.triton_backward(
            "gru", "direct", *saved, x, y, state, weights, [y, *state], None, None, k, False, True, "ieee"
        )
    assert counter.get_total_flops() == gates * (inputs + H + 2 * inputs + (1 + k) * H)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.compiles
def test_a_compiled_lstm_is_measured_and_follows_a_schedule(x):
    model = nn.ModuleDict({"layer": sf.LSTM(3, 4, feedback="dsf")})
    plain = copy.deepcopy(model)

    class Loss(nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.parts = parts

        def forward(self, x):
            return total(self.parts["layer"], x)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(Loss(model), backend="aot_eager", fullgraph=True)
        compiled(x).backward()
        found = sf.alignment(compiled, lambda m, x: m(x), x, lags=0).total
        assert found == sf.alignment(Loss(plain), lambda m, x: m(x), x, lags=0).total
        sf.Schedule("bptt").apply(model, 0.0)
        model.zero_grad()
        compiled(x).backward()
        sf.Schedule("torch").apply(model, 0.0)
        with pytest.raises(Exception, match=r"torch.compile cannot train the LSTM of torch.nn: set feedback to .bptt"):
            compiled(x)
    sf.Schedule("torch").apply(plain, 0.0)
    total(plain["layer"], x).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# Small ones -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("rule", ["bptt", "torch", "dsf", "calibrated", "fitted"])
@every_layer
def test_an_empty_batch_with_lengths_or_resets(cell, rule, batch_first):
    layer = LAYERS[cell](3, 4, bidirectional=True, batch_first=batch_first, feedback=rule)
    shape = (0, 5) if batch_first else (5, 0)
    for options in ({"lengths": torch.zeros(0, dtype=torch.int64)}, {"resets": torch.zeros(shape, dtype=torch.bool)}):
        y, state = layer(torch.zeros(*shape, 3, requires_grad=True), **options)
        y.sum().backward()
        assert tuple(y.shape) == (*shape, 8)
        assert tuple((state[0] if cell == "lstm" else state).shape) == (2, 0, 4)


class Generated(nn.Module):
    """A layer without Parameters, whose weights another parameter makes, as in a hypernetwork."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = kind(3, 4, **options), nn.Parameter(torch.ones(()))
        self.made = {name: p.detach().clone() for name, p in self.layer.named_parameters()}
        for name in self.made:
            del self.layer._parameters[name]

    def forward(self, x):
        for name, weight in self.made.items():
            setattr(self.layer, name, weight * self.scale)
        self.layer._flat_weights = [getattr(self.layer, name) for name in self.layer._flat_weights_names]
        return self.layer(x)[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rule", ["bptt", "torch", "dsf", "calibrated"])
@every_layer
def test_weights_that_are_no_parameters(cell, rule, autocast, x):
    ours, other = Generated(LAYERS[cell], feedback=rule), Generated(TORCHS[cell])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = ours(x), other(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0, atol=0.05 if autocast else 1e-6)
        y.float().sum().backward()
        expected.float().sum().backward()
    if rule in ("bptt", "torch"):
        torch.testing.assert_close(ours.scale.grad, other.scale.grad, rtol=0.05, atol=0)
    ours.layer.feedback = "calibrated"
    assert abs(sf.alignment(ours, lambda m, x: m(x).square().sum(), x).total.norm_ratio - 1) > 1e-4
    assert type(sf.restore(ours).layer) is TORCHS[cell]


@pytest.mark.parametrize("rule", ["bptt", *APPROXIMATE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_user_defined_cell_accepts_tokens(rule, dtype):
    class Embedded(nn.Module):
        hidden_size = 4

        def __init__(self):
            super().__init__()
            self.embedding, self.cell = nn.Embedding(5, 3), nn.GRUCell(3, 4)

        def forward(self, x, h):
            return self.cell(self.embedding(x[:, 0]), h)

    layer = sf.Recurrent(Embedded().to(dtype), rule)
    tokens = torch.randint(5, (6, 2, 1))
    y, h = layer(tokens)
    assert y.dtype == h.dtype == dtype
    y.sum().backward()
    assert layer.cell.embedding.weight.grad.abs().sum() > 0
    torch.testing.assert_close(y, layer(tokens, torch.zeros(2, 4, dtype=dtype))[0])


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("rule", ["bptt", "dsf"])
@pytest.mark.parametrize("cell", [sf.RNN, sf.GRU, sf.LSTM, sf.SLSTM])
def test_a_weight_without_memory_raises(cell, rule, steps):
    names = [name for name, _ in cell(3, 8, num_layers=2).named_parameters()]
    for name in names:  # as after load_state_dict(strict=False, assign=True) on meta
        layer = cell(3, 8, num_layers=2, feedback=rule)
        setattr(layer, name, nn.Parameter(getattr(layer, name).to("meta")))
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="device"):
                layer(torch.randn(steps, 2, 3))


@pytest.mark.parametrize("cell", [sf.RNN, sf.GRU, sf.LSTM, sf.SLSTM])
@pytest.mark.parametrize("rule", ["bptt", "dsf"])
def test_an_initial_state_without_memory_raises(cell, rule):
    layer = cell(3, 8, feedback=rule)
    x = torch.randn(7, 2, 3)
    _, hx = layer(x)
    hx = hx.to("meta") if isinstance(hx, torch.Tensor) else tuple(s.to("meta") for s in hx)
    with pytest.raises(RuntimeError, match="device"):
        layer(x, hx)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("rule", ["bptt", "dsf", "torch"])
@pytest.mark.parametrize("cell", [sf.RNN, sf.GRU, sf.LSTM])
def test_an_empty_tuple_is_no_initial_state(cell, rule, steps):
    layer = cell(3, 8, feedback=rule)
    with pytest.raises((AttributeError, IndexError, RuntimeError), match=r"tuple|must be a pair \(h, c\)"):
        layer(torch.randn(steps, 2, 3), ())


@every_layer
def test_a_learned_rule_set_in_inference_mode_trains(cell):
    layer = LAYERS[cell](3, 4)
    with torch.inference_mode():
        layer.feedback = "calibrated"
        layer(torch.randn(5, 2, 3))
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert layer.diagonal_updates.tolist() == [1]


@pytest.mark.parametrize("saved", [["statefeed"], ["aten"], ["aten", "statefeed"]])
@every_layer
def test_selective_checkpointing_changes_no_gradient(cell, saved):
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op.namespace in saved else CheckpointPolicy.PREFER_RECOMPUTE

    layer = LAYERS[cell](3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(7, 2, 3, requires_grad=True)

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    contexts = partial(create_selective_checkpoint_contexts, policy)
    found = gradients(checkpoint(layer, x, use_reentrant=False, context_fn=contexts)[0])
    torch.testing.assert_close(found, gradients(layer(x)[0]))
