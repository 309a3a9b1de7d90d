"""Mistakes of a first use: each has one sentence with the remedy."""

import copy
import importlib
import io
import pickle
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import statefeed as sf

IN_PLACE = "swap changes the model in place and returns a report: write sf.swap(model) and use model"


@pytest.fixture
def model():
    return nn.Sequential(nn.GRU(2, 3))


@pytest.fixture
def report(model):
    return sf.swap(model, "dsf")


@pytest.mark.parametrize(
    "use",
    [
        lambda report: report.train(),
        lambda report: report.parameters(),
        lambda report: report(torch.zeros(1, 1, 2)),
        lambda report: report[0],
        lambda report: list(report),
        lambda report: sf.swap(report),
        lambda report: sf.restore(report),
        lambda report: sf.alignment(report, lambda m, x: m(x), torch.zeros(1, 1, 2)),
        lambda report: sf.Schedule("dsf").apply(report, 0.0),
        lambda report: sf.Monitor(lambda m, x: m(x), torch.zeros(1, 1, 2))(report, 0),
    ],
)
def test_the_report_of_swap_is_not_the_model(use, report):
    with pytest.raises((AttributeError, TypeError)) as caught:
        use(report)
    assert str(caught.value).endswith(IN_PLACE)
    assert "\n" not in str(caught.value)


def test_the_report_of_swap_is_a_value(report):
    for same in (copy.copy(report), copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert same == report
        assert repr(same) == repr(report)
        assert str(same) == str(report)
    for name in ("train", "__len__", "_repr_html_", "__array__"):
        assert not hasattr(report, name)
    assert report.swapped.keys() == {"0"}


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda model: sf.swap("gate+1", model), "str: call swap(model, feedback)"),
        (lambda model: sf.swap(nn.GRU), "type: call swap(model, feedback)"),
        (lambda model: sf.restore("gate+1"), "str: call restore(model)"),
        (lambda model: sf.alignment(lambda m, x: m(x), model, 1), "function: call alignment(model, loss_fn, batch)"),
        (lambda model: sf.Schedule("dsf").apply(0.5, model), "float: call apply(model, step / steps)"),
        (lambda model: sf.Monitor(print, 1)(0, model), "int: call the monitor with (model, step)"),
    ],
)
def test_the_first_argument_is_the_model(call, got, model):
    with pytest.raises(TypeError) as caught:
        call(model)
    assert str(caught.value) == f"the first argument must be the model, a torch.nn.Module, got {got}"
    assert type(model[0]) is nn.GRU


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda model, f: sf.alignment(model, torch.ones(1), f), "Tensor: call alignment(model, loss_fn, batch)"),
        (lambda model, f: sf.Monitor(model, f), "Sequential: call Monitor(loss_fn, batch)"),
        (lambda model, f: sf.Monitor(torch.ones(1), f), "Tensor: call Monitor(loss_fn, batch)"),
    ],
)
def test_the_loss_is_a_function_of_the_model_and_the_batch(call, got, model):
    with pytest.raises(TypeError) as caught:
        call(model, lambda m, x: m(x)[0].sum())
    assert str(caught.value).startswith(f"loss_fn must be a function of the model and the batch, got {got}")


def test_a_loss_that_is_a_module_is_a_function_too(model):
    class Loss(nn.Module):
        def forward(self, model, batch):
            return model(batch)[0].square().sum()

    sf.swap(model, "dsf")
    assert sf.alignment(model, Loss(), torch.ones(5, 1, 2), lags=0).total.cosine > 0


@pytest.mark.parametrize("fraction", [500, -3, 1.0000001, -1e-9, float("nan"), float("inf")])
def test_a_schedule_needs_a_fraction_of_training(fraction, model):
    schedule = sf.Schedule("dsf@0.3/bptt")
    sf.swap(model)
    for use in (lambda: schedule.at(fraction), lambda: schedule.apply(model, fraction)):
        with pytest.raises(ValueError, match=r"between 0 and 1, got \S+: pass step / steps$"):
            use()
    assert str(model[0].feedback) == "bptt"


def test_a_schedule_warns_once_of_a_model_without_layers(model):
    schedule = sf.Schedule("dsf@0.5/bptt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not any(schedule.apply(model, step / 10) for step in range(10))
        sf.swap(model)
        assert schedule.apply(model, 0.0)
    (warning,) = caught
    assert str(warning.message) == "the model has no statefeed layer: call sf.swap(model) first"
    assert warning.filename == __file__


def test_swap_says_how_a_layer_that_it_keeps_becomes_exact(model, report):
    remedy = '; feedback="bptt" makes it exact'
    assert sf.swap(model).kept == {"0": f"already a statefeed layer, with feedback 'dsf'{remedy}"}
    assert sf.swap(model, feedback="bptt").swapped
    assert sf.swap(model).kept == {"0": "already a statefeed layer, with feedback 'bptt'"}


@pytest.mark.parametrize("layer", [nn.Sequential(sf.GRU(2, 3)), nn.GRU(2, 3), torch.zeros(1, 1, 2)])
def test_explain_takes_one_layer(layer):
    with pytest.raises(TypeError, match=r"pass one layer of the model, such as model\.rnn, after sf\.swap\(model\)$"):
        sf.explain(layer, torch.zeros(1, 1, 2))


def test_explain_needs_an_input():
    with pytest.raises(TypeError, match=r"^x must be an input of the layer, a tensor or PackedSequence, got GRU$"):
        sf.explain(sf.GRU(2, 3), nn.GRU(2, 3))


AGAIN = "no conclusion can be drawn: measure again on a quiet machine"


@pytest.mark.parametrize(
    ("rule", "own", "load", "expected"),
    [
        ("dsf", [1.0] * 5, 0.0, None),
        ("dsf", [4.0] * 5, 0.0, "slower than torch.nn, here: 2.00 times its time"),
        ("dsf", [4.0] * 5, None, "slower than torch.nn, here: 2.00 times its time"),
        ("dsf", [4.0] * 5, 1.5, f"busy: other processes used 1.5 of 8 processors; {AGAIN}"),
        ("dsf", [1.0] * 5, 1.5, f"busy: other processes used 1.5 of 8 processors; {AGAIN}"),
        ("dsf", [4.0, 4.0, 4.0, 4.0, 1.0], 0.0, f"0.50 to 2.00 times faster than torch.nn; {AGAIN}"),
        ("dsf", [1.0, 1.0, 1.0, 1.0, 4.0], 0.0, f"0.50 to 2.00 times faster than torch.nn; {AGAIN}"),
        ("dsf", [1.8] * 5, 0.0, 'slower than "bptt", which is exact, here: 1.20 times its time'),
        ("dsf", [1.0, 1.0, 1.8, 1.0, 1.0], 0.0, f'0.83 to 1.50 times faster than "bptt", which is exact; {AGAIN}'),
        ("bptt", [1.8] * 5, 0.0, None),
        ("bptt", [1.8] * 5, 1.5, f"busy: other processes used 1.5 of 8 processors; {AGAIN}"),
    ],
)
def test_times_decide_only_what_they_can(rule, own, load, expected, monkeypatch):
    """torch.nn takes 2 s and ``"bptt"`` 1.5 s every time."""
    timing = importlib.import_module("statefeed.timing")
    monkeypatch.setattr(importlib.import_module("statefeed.busy").os, "cpu_count", lambda: 8)
    monkeypatch.setattr(timing.OtherLoad, "processors", lambda self: load)
    calls = {rule: 0}

    def seconds(layer, x):
        name = str(layer.feedback)
        if name == rule:
            calls[rule] += 1
            return own[max(calls[rule] - 2, 0)]
        return {"bptt": 1.5, "torch": 2.0, "dsf": 1.0}[name]

    monkeypatch.setattr(timing, "seconds_of", seconds)
    assert timing.time_rules(sf.GRU(2, 3, feedback=rule), torch.zeros(50, 4, 2)).conclusion(rule == "bptt") == expected


def test_torchs_own_path_is_not_compared_with_itself(monkeypatch):
    timing = importlib.import_module("statefeed.timing")
    monkeypatch.setattr(timing, "seconds_of", lambda layer, x: 2.0 if str(layer.feedback) == "torch" else 3.0)
    monkeypatch.setattr(timing.OtherLoad, "processors", lambda self: 0.0)
    for rule, slower in (("torch", False), ("dsf", True)):
        found = sf.explain(sf.GRU(2, 3, feedback=rule), torch.zeros(50, 4, 2), timed=True)
        assert (found.warning is not None) == slower
    layer = sf.GRU(2, 3)  # a single step runs through torch's own layer
    assert sf.explain(layer, torch.zeros(1, 4, 2), timed=True).warning is None


class Stderr(io.StringIO):
    """A stream that says when something was written."""

    def __init__(self, written):
        super().__init__()
        self.written = written

    def flush(self):
        self.written.set()


def test_compiling_says_so_where_it_takes_long(tmp_path, monkeypatch):
    build = importlib.import_module("statefeed.native.build")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "cache_key", lambda: "key")

    def first_use(delay, slow):
        written = threading.Event()
        stderr = Stderr(written)

        def compile_library(target, torch_folder, flags):
            if slow:
                assert written.wait(60)
            target.touch(0o700)

        monkeypatch.setattr(build, "NOTICE_DELAY", delay)
        monkeypatch.setattr(build, "compile_library", compile_library)
        monkeypatch.setattr(sys, "stderr", stderr)
        library = build.compiled_library()
        return library, stderr.getvalue()

    notice = "statefeed: compiling the CPU kernels, once per machine, about 20 seconds of one core\n"
    library, text = first_use(0.0, True)
    assert text == notice
    assert first_use(0.0, False) == (library, "")  # it is cached
    library.unlink()
    assert first_use(3600.0, False) == (library, "")  # it is fast
