"""The fixed table of calls that torch's own layers run, and that nothing but the call decides."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import statefeed as sf
from statefeed import native as kernels
from statefeed.paths import onednn_supports_bf16

LAYERS = {"rnn": sf.RNN, "gru": sf.GRU, "lstm": sf.LSTM}

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.unavailable()}"),
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN"),
]

# Shapes (T, B, H) far from the borders of the table, and whether torch's own layer was faster there.
KNOWN = [  # with one thread
    ("gru", "float32", False, (1, 64, 256), True),
    ("gru", "float32", False, (2, 1, 64), True),
    ("gru", "float32", False, (2, 16, 64), False),
    ("gru", "float32", False, (8, 16, 64), False),
    ("gru", "bfloat16", False, (4, 16, 64), False),
    ("rnn", "float32", False, (2, 16, 64), True),
    ("rnn", "float32", False, (4, 64, 256), False),
    ("rnn", "float32", False, (4, 16, 64), True),
    ("lstm", "bfloat16", False, (32, 256, 128), False),
    ("rnn", "float32", False, (16, 16, 64), False),
    ("rnn", "float32", True, (3, 4, 64), True),
    ("lstm", "float32", False, (8, 16, 64), True),
    ("lstm", "float64", False, (8, 16, 64), False),
    ("lstm", "float32", True, (8, 16, 64), False),
    ("lstm", "float32", False, (64, 128, 256), False),
    ("lstm", "float32", False, (500, 1, 64), False),
    ("lstm", "float32", False, (2000, 2, 32), False),
    ("lstm", "bfloat16", False, (64, 32, 256), True),
    ("lstm", "bfloat16", False, (4, 16, 64), False),
    ("lstm", "bfloat16", False, (512, 4, 256), False),
]


@pytest.fixture
def torchs(monkeypatch):
    """Records the calls that torch's own layers run."""
    ran = []
    for layer in LAYERS.values():
        for name in ("_torch_path", "_torch_function"):
            path = getattr(layer, name)
            monkeypatch.setattr(layer, name, lambda self, *a, path=path: ran.append(a) or path(self, *a))
    return ran


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def input_of(shape, packed=False, dtype=torch.float32):
    x = torch.zeros(shape, dtype=dtype)
    lengths = torch.full((shape[1],), shape[0])
    lengths[1:] = max(1, shape[0] // 2)  # with one length, oneDNN runs a packed LSTM too
    return pack_padded_sequence(x, lengths) if packed else x


@pytest.mark.parametrize(("cell", "dtype", "packed", "shape", "expected"), KNOWN)
def test_the_table_has_what_was_measured(cell, dtype, packed, shape, expected, threads):
    threads(1)
    if cell == "lstm" and dtype == "bfloat16" and not onednn_supports_bf16():
        pytest.skip("oneDNN has no bfloat16 here")
    parameters = torch.float64 if dtype == "float64" else torch.float32
    layer = LAYERS[cell](shape[2], shape[2], dtype=parameters)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        found = sf.explain(layer, input_of(shape, packed, parameters))
    assert ("torch.nn" in found.forward) == expected
    assert ("faster" in found.why or "one step" in found.why) == expected


@pytest.mark.parametrize(("cell", "shape"), [("lstm", (16, 16, 64)), ("lstm", (32, 16, 64))], ids=str)
def test_several_threads_prefer_the_kernels(cell, shape, threads):
    layer, x = LAYERS[cell](shape[2], shape[2]), input_of(shape)
    for count, expected in ((1, True), (2, False)):
        threads(count)
        assert ("torch.nn" in sf.explain(layer, x).forward) == expected


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_neither_the_mode_nor_the_time_decides(cell, bf16, torchs):
    layer = LAYERS[cell](8, 8)
    for shape in ((1, 2, 8), (2, 8, 8), (5, 2, 8), (20, 8, 8), (200, 2, 8)):
        for packed in (False, True):
            x, paths = input_of(shape, packed), set()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                explained = "torch.nn" in sf.explain(layer, x).forward
                for training in (True, False):
                    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                        torchs.clear()
                        with mode():
                            layer.train(training)(x)
                        paths.add(bool(torchs))
            assert paths == {explained}, (shape, packed)


@pytest.mark.parametrize("cell", LAYERS)
def test_an_approximate_rule_trains_through_kernels_and_steps_through_torch(cell, torchs):
    layer, x = LAYERS[cell](8, 8, feedback="dsf"), torch.zeros(1, 2, 8)
    layer(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x)  # the numbers of training
    assert not torchs
    layer.step(x[0])
    assert torchs


def test_without_onednn_the_table_of_an_lstm_is_another(monkeypatch):
    layer, x = sf.LSTM(8, 8), torch.zeros(5, 8, 8)
    assert "torch.nn" in sf.explain(layer, x).forward
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert "torch.nn" not in sf.explain(layer, x).forward


def test_a_subclass_may_ignore_the_table(torchs):
    class Kernels(sf.GRU):
        def is_faster_in_torch(self, input):
            return False

    layer, x = Kernels(8, 8), torch.zeros(1, 2, 8)
    y, _ = layer(x)
    assert not torchs
    plain = torch.nn.GRU(8, 8)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y, plain(x)[0])
