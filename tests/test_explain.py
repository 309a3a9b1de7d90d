"""explain against counts by hand, and the exact rule through the kernels against torch's."""

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import tables
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import statefeed as sf
from statefeed import native as kernels

T, B, I, H = 11, 3, 7, 9
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.unavailable()}")


@needs_kernels
def test_products_and_memory_of_a_fused_gru() -> None:
    result = sf.explain(sf.GRU(I, H, feedback="gate+2"), torch.zeros(T, B, I))
    unit_input, unit_hidden = 2 * T * B * 3 * H * I, 2 * T * B * 3 * H * H
    assert result.forward_flops == unit_input + unit_hidden
    assert result.backward_flops == 2 * unit_input + unit_hidden + 2 * unit_hidden
    assert result.bptt_flops == 2 * unit_input + 2 * unit_hidden
    assert result.backward_steps == 3
    assert result.kept_bytes == 4 * T * B * (I + H + 4 * H)
    assert "fused" in result.forward
    assert "fused" in result.backward


@pytest.mark.parametrize("weight_norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("rule", ["bptt", "gate+1", "torch"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_parametrized_layer_has_the_report_of_its_weights(weight_norm: Callable[..., object], rule: str) -> None:
    plain, layer, x = sf.GRU(I, H, 2, feedback=rule), sf.GRU(I, H, 2, feedback=rule), torch.zeros(T, B, I)
    for name in ("weight_hh_l0", "weight_ih_l1"):
        weight_norm(layer, name)
    assert sf.explain(layer, x) == sf.explain(plain, x)


def test_the_reason_is_named() -> None:
    layer = sf.GRU(I, H)
    assert "bfloat16" in sf.explain(layer.bfloat16(), torch.zeros(T, B, I, dtype=torch.bfloat16)).why
    result = sf.explain(sf.GRU(I, H, 2, bidirectional=True, feedback="torch"), torch.zeros(T, B, I))
    assert "torch" in result.why
    assert result.backward_steps == 2 * T
    assert result.kept_bytes is None


def test_nothing_is_saved_where_nothing_requires_a_gradient() -> None:
    layer, x = sf.GRU(I, H, feedback="dsf"), torch.zeros(T, B, I)
    saved = sf.explain(layer, x).kept_bytes
    assert saved
    with torch.no_grad():
        assert sf.explain(layer, x).kept_bytes == 0
    layer.requires_grad_(False)
    frozen = sf.explain(layer, x)
    assert frozen.kept_bytes == 0
    assert "nothing saved for the backward pass" in str(frozen)
    assert sf.explain(layer, x.requires_grad_()).kept_bytes == saved


def saved_by(layer: nn.Module, x: torch.Tensor | nn.utils.rnn.PackedSequence) -> int:
    """Bytes of the memory that autograd saves in a call, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, int] = {}
    alive = []  # or a later tensor takes the memory of an earlier one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(size for place, size in saved.items() if place not in weights)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "make", [sf.RNN, sf.GRU, sf.LSTM, partial(sf.LSTM, proj_size=4), partial(sf.SLSTM, num_heads=2)]
)
def test_the_bytes_are_those_that_autograd_saves(
    make: Callable[..., nn.Module], layers: int, directions: int, autocast: bool, backend: str
) -> None:
    if backend == "cpu" and not kernels.available():
        pytest.skip(f"no kernels: {kernels.unavailable()}")
    layer, x = (
        make(16, 32, num_layers=layers, bidirectional=directions == 2, feedback="jacobian"),
        torch.randn(300, 2, 16),
    )
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([300, 250]))
    with tables.only(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for given in (x, packed):
            found = sf.explain(layer, given).kept_bytes
            assert found is not None
            assert found == pytest.approx(saved_by(layer, given), rel=0.02)  # the small initial states


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_input_after_dropout_is_saved_too(backend: str) -> None:
    if backend == "cpu" and not kernels.available():
        pytest.skip(f"no kernels: {kernels.unavailable()}")
    layer, x = sf.GRU(I, H, 3, dropout=0.5, feedback="dsf"), torch.zeros(T, B, I)
    with tables.only(backend):
        trained = sf.explain(layer, x).kept_bytes
        evaluated = sf.explain(layer.eval(), x).kept_bytes
    assert trained - evaluated == 2 * 4 * T * B * H


def test_an_input_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    loaded = kernels.load
    monkeypatch.setattr(
        kernels, "load", lambda device: kernels.Loaded("Triton 3", None) if device == "cuda" else loaded(device)
    )
    with FakeTensorMode():
        x = torch.zeros(T, B, I, device="cuda")
    result = sf.explain(sf.GRU(I, H, feedback="gate+1"), x)
    assert "cuDNN" in result.forward
    assert "Triton" in result.backward
    assert "products run in TF32, as cuDNN is set" in result.why
    torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses without a GPU
    try:
        autocast = sf.explain(sf.GRU(I, H, feedback="gate+1"), x)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert f"products run in {torch.get_autocast_dtype('cuda')}, under autocast" in autocast.why
    unit_input, unit_hidden = 2 * T * B * 3 * H * I, 2 * T * B * 3 * H * H
    assert result.backward_flops == 3 * unit_input + 3 * unit_hidden
    assert result.kept_bytes == 4 * T * B * (I + H)
    assert "cuDNN" in sf.explain(sf.GRU(I, H, feedback="bptt"), x).why


def test_packed_and_batch_first_inputs_count_their_rows() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(5, I), torch.zeros(2, I)])
    result = sf.explain(sf.GRU(I, H, feedback="bptt"), packed)
    assert result.forward_flops == 2 * 7 * 3 * H * (I + H)
    result = sf.explain(sf.RNN(I, H, batch_first=True, feedback="torch"), torch.zeros(B, T, I))
    assert result.backward_steps == T


def test_every_fact_is_printed() -> None:
    lines = str(sf.explain(sf.LSTM(I, H, feedback="dsf"), torch.zeros(100, B, I))).splitlines()
    assert [line.split()[0] for line in lines] == ["rule", "forward", "backward", "why", "memory"]


@pytest.mark.parametrize(
    ("rule", "steps", "expected"),
    [
        ("dsf", 1, "T = 1 steps, no fewer"),
        ("gate", 1, "T = 1 steps, no fewer"),
        ("gate+3", 4, "4 dependent products over T = 4 steps"),
        ("gate+2", 4, None),
        ("gate+9", 64, "times those of exact BPTT"),
        ("dsf", 64, None),
        ("gate+1", 64, None),
        ("torch", 1, None),
        ("bptt", 1, None),
    ],
)
def test_a_rule_that_is_expected_slower_than_exact_bptt_warns(rule: str, steps: int, expected: str | None) -> None:
    result = sf.explain(sf.GRU(8, 8, feedback=rule), torch.zeros(steps, 2, 8))
    if expected is None:
        assert result.warning is None
        assert "warning" not in str(result)
    else:
        assert expected in str(result.warning)
        assert str(result).splitlines()[-1] == f"warning   {result.warning}"


@needs_kernels
def test_an_input_that_bptt_leaves_to_torch_is_named() -> None:
    assert "torch.nn's own path" in sf.explain(sf.GRU(64, 64), torch.zeros(2, 1, 64)).forward
    assert '"bptt" takes torch\'s own path' in str(
        sf.explain(sf.GRU(64, 64, feedback="dsf"), torch.zeros(2, 1, 64)).warning
    )
    assert sf.explain(sf.GRU(64, 64, feedback="dsf"), torch.zeros(64, 16, 64)).warning is None


@needs_kernels
def test_products_are_counted_against_those_of_exact_bptt() -> None:
    """With I = H exact BPTT takes 6 units, a fused rule 5 + k: more than 9 from k = 5 on."""
    for k, warned in ((4, False), (5, True)):
        result = sf.explain(sf.GRU(8, 8, feedback=f"jacobian+{k}"), torch.zeros(64, 2, 8))
        assert (result.warning is not None) == warned
    assert "1.7 times" in str(result.warning)


@pytest.mark.parametrize("slower", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_was_timed_decides(slower: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by a set amount for every pass: 2 s for torch.nn, 0.5 or 4 for the rule."""
    layer = sf.LSTM(I, H, 2, dropout=0.5, feedback="calibrated")
    x = nn.utils.rnn.pack_sequence([torch.zeros(5, I), torch.zeros(2, I)]) if packed else torch.zeros(T, B, I)
    ran: list[str] = []
    run = sf.LSTM.forward

    def forward(module: sf.LSTM, *args: object) -> object:
        ran.append(str(module.feedback))
        return run(module, *args)

    now, readings = [0.0], []

    def clock(_: torch.Tensor) -> float:
        """Read before and after every pass, so that an even number of readings ends one."""
        readings.append(1)
        if len(readings) % 2 == 0:
            now[0] += {"calibrated": 4.0 if slower else 0.5, "bptt": 1.0, "dsf": 0.5, "torch": 2.0}[ran[-1]]
        return now[0]

    monkeypatch.setattr(sf.LSTM, "forward", forward)
    timing = importlib.import_module("statefeed.timing")
    monkeypatch.setattr(timing, "clock", clock)
    monkeypatch.setattr(timing.OtherLoad, "processors", lambda self: 0.0)
    state = torch.get_rng_state()
    result = sf.explain(layer, x, timed=True)
    assert (result.seconds, result.torch_seconds) == (4.0 if slower else 0.5, 2.0)
    assert (result.warning is not None) == slower
    assert result.timings[1:] == (("bptt", 1.0, (2.0,) * 3), ("dsf", 0.5, (4.0,) * 3), ("torch", 2.0, (1.0,) * 3))
    ratio = "0.50 (0.50 to 0.50)" if slower else "4.00 (4.00 to 4.00)"
    text = str(result)
    assert "bptt 1e+03 ms, dsf 500 ms, torch.nn 2e+03 ms; forward and backward, medians of runs in turns" in text
    assert "times faster than torch.nn, median (range) over the turns: calibrated" in text
    assert f"calibrated {ratio}, bptt 2.00 (2.00 to 2.00), dsf 4.00 (4.00 to 4.00)" in text
    assert "\nmachine   " in text
    assert ran == ["calibrated", "bptt", "dsf", "torch"] * 6
    # The layer is as it was, and so is the generator that dropout draws from.
    assert not layer.diagonal.any()
    assert all(p.grad is None for p in layer.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_ratios_have_the_range_of_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = importlib.import_module("statefeed.timing")
    turns = iter([9.0] * 3 + [1.0, 2.0, 4.0, 2.0, 2.0, 6.0] + [1.0, 1.0, 5.0] * 3)
    monkeypatch.setattr(timing, "seconds_of", lambda layer, x: next(turns))
    bptt, dsf, torchs = timing.time_rules(sf.GRU(I, H), torch.zeros(T, B, I)).rules
    assert (bptt, dsf) == (("bptt", 1.0, (5.0, 3.0, 5.0)), ("dsf", 1.0, (5.0, 2.0, 5.0)))
    assert torchs == ("torch", 5.0, (1.0, 1.0, 1.0))


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = importlib.import_module("statefeed.busy")
    readings = {"all": iter([100.0, 107.0]), "own": iter([50.0, 54.0]), "time": iter([0.0, 2.0])}
    monkeypatch.setattr(busy, "all_seconds", lambda: next(readings["all"]))
    monkeypatch.setattr(busy, "own_seconds", lambda: next(readings["own"]))
    monkeypatch.setattr(busy.time, "monotonic", lambda: next(readings["time"]))
    monkeypatch.setattr(busy.os, "cpu_count", lambda: 8)
    assert busy.OtherLoad().processors() == 1.5  # (7 - 4) s of others' work in 2 s
    assert busy.describe(1.5) == "busy: other processes used 1.5 of 8 processors; measure again when it is quiet"


def test_a_warning_about_a_busy_machine_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = importlib.import_module("statefeed.timing")
    monkeypatch.setattr(timing.OtherLoad, "processors", lambda self: 1.5)
    text = str(sf.explain(sf.GRU(I, H, feedback="dsf"), torch.zeros(T, B, I), timed=True))
    assert text.count("busy") == 1
    assert "\nwarning   busy: other processes used 1.5 of" in text


def test_timing_is_real() -> None:
    result = sf.explain(sf.GRU(I, H), torch.zeros(T, B, I), timed=True)
    assert result.seconds is not None
    assert result.torch_seconds is not None
    assert min(result.seconds, result.torch_seconds) > 0


def test_other_layers_raise() -> None:
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.rnn\.GRU: pass one layer of the model"):
        sf.explain(nn.GRU(2, 3), torch.zeros(1, 2))


@pytest.mark.parametrize("shape", [(0, B, I), (T, 0, I), (T, B, I + 1)])
def test_an_unsupported_input_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^x must have at least one step and row and {I} features, [^\n]+$"):
        sf.explain(sf.GRU(I, H), torch.zeros(shape))


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("packed", [False, True])
def test_bptt_is_exact(cell: str, packed: bool) -> None:
    torch.manual_seed(0)
    plain = getattr(nn, cell)(I, H, 2, bidirectional=True, dtype=torch.float64)
    ours = getattr(sf, cell)(I, H, 2, bidirectional=True, dtype=torch.float64, feedback="bptt")
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(4, B, H, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (plain, ours):
        given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, 4, 7]), enforce_sorted=False) if packed else x
        y, final = layer(given, (h, h) if cell == "LSTM" else h)
        outputs = [y.data if packed else y, *(final if cell == "LSTM" else (final,))]
        loss = sum(v.square().sum() for v in outputs)
        found.append([loss, *torch.autograd.grad(loss, [x, h, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@needs_kernels
def test_bptt_runs_through_the_kernels() -> None:
    layer = sf.GRU(I, H, feedback="bptt")
    assert "fused" in sf.explain(layer, torch.zeros(T, B, I)).backward
    with torch.profiler.profile() as profile:
        layer(torch.zeros(T, B, I))[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "statefeed::layer_backward" in names


def test_times_of_a_subclass_that_returns_its_outputs_alone() -> None:
    class Outputs(nn.GRU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, _ = super().forward(x)
            return y

    layer = Outputs(I, H)
    sf.swap(layer, "dsf")
    assert [timing.rule for timing in sf.explain(layer, torch.zeros(T, B, I), timed=True).timings] == [
        "dsf",
        "bptt",
        "torch",
    ]
