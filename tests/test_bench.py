"""statefeed bench: the baseline is correct, parity is checked first, and records have the right values."""

import json
import re

import pytest
import torch
from tolerances import assert_different, assert_same
from torch import nn

import statefeed as sf
from statefeed.bench import layers, main, measure, memory, scan
from statefeed.bench.options import OptionError, Shape
from statefeed.bench.precision import flags
from statefeed.bench.published import published

CELLS = ["rnn", "gru", "lstm"]
BENCHMARKS = ["layers", "scan", "memory"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(tmp_path, *flags):
    """The exit code, and the path of the records."""
    output = tmp_path / "records.jsonl"
    return main([*flags, f"--output={output}"]), output


# The baseline --------------------------------------------------------------------------------------------------------


def gradients(forward, layer, x, cotangents):
    """Gradients in x and the parameters of a loss on the outputs and the final state."""
    y, final = forward(x)
    outputs = [y, *(final if isinstance(final, tuple) else [final])]
    named = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(outputs, list(named.values()), cotangents[: len(outputs)])
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_published_procedure_is_dsf(cell):
    plain, ours = getattr(nn, cell.upper())(5, 7).double(), getattr(sf, cell.upper())(5, 7, feedback="dsf").double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(11, 3, 5, dtype=torch.float64, requires_grad=True)
    cotangents = [torch.randn(11, 3, 7).double(), torch.randn(1, 3, 7).double(), torch.randn(1, 3, 7).double()]

    y, final = published(plain, x)
    expected_y, expected_final = plain(x)
    assert_same({"y": y, "final": torch.stack([*final])}, {"y": expected_y, "final": torch.stack([*expected_final])})

    found = gradients(lambda x: published(plain, x), plain, x, cotangents)
    assert_same(found, gradients(ours, ours, x, cotangents))
    assert_different(found, gradients(plain, plain, x, cotangents))


# Parity --------------------------------------------------------------------------------------------------------------


class WrongForward(sf.GRU):
    def forward(self, input, hx=None):
        y, final = super().forward(input, hx)
        return 1.001 * y, final


class WrongGradient(sf.GRU):
    """Truncates under every rule without corrections."""

    def forward(self, input, hx=None):
        rule = self.feedback
        if not rule.corrections:
            self.feedback = "ft-bptt"
        result = super().forward(input, hx)
        self.feedback = rule
        return result


class WrongCorrection(sf.GRU):
    """Applies one correction too few."""

    def forward(self, input, hx=None):
        rule = self.feedback
        if rule.corrections:
            self.feedback = sf.Feedback(rule.diagonal, rule.corrections - 1)
        result = super().forward(input, hx)
        self.feedback = rule
        return result


@pytest.mark.parametrize("benchmark", ["layers", "memory"])
@pytest.mark.parametrize(
    ("wrong", "rule", "what"),
    [
        (WrongForward, "dsf", "output y"),
        (WrongGradient, "dsf", "gradient"),
        (WrongCorrection, "gate", "gradient"),
        (WrongCorrection, "0.5", "gradient"),
    ],
)
def test_parity_catches_a_planted_error_before_anything_is_timed(
    wrong, rule, what, benchmark, tmp_path, capsys, monkeypatch
):
    def timed(*_):
        raise AssertionError("timed")

    monkeypatch.setattr(layers, "interleaved", timed)
    monkeypatch.setattr(memory, "in_new_process", timed)
    monkeypatch.setattr(sf, "GRU", wrong)
    code, output = run(tmp_path, benchmark, "--smoke", "--cells=gru", f"--rules={rule}")
    (printed,) = (line for line in capsys.readouterr().err.splitlines() if "checking" not in line)
    assert code == 1
    assert what in printed
    assert f"statefeed {rule}" in printed
    assert "nothing was timed" in printed
    assert not output.exists()


def test_parity_of_the_scans_catches_a_planted_error(tmp_path, capsys, monkeypatch):
    right = sf.diagonal_scan
    monkeypatch.setattr(
        sf, "diagonal_scan", lambda *args, **kwargs: right(*args, **kwargs) + (kwargs["method"] == "prefix") * 1e-6
    )
    code, output = run(tmp_path, "scan", "--smoke")
    assert code == 1
    assert "diagonal_scan by prefix must agree" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("dtype", layers.DTYPES["cpu"])
@pytest.mark.parametrize("cell", CELLS)
def test_parity_holds_for_every_contender(cell, dtype):
    case = layers.Case(cell, Shape(20, 3, 24), dtype, "cpu")
    rules = layers.rules_of(cell, "bptt,ft-bptt,dsf,0.3,calibrated,gate,jacobian,gate+1")
    entries = layers.contenders(case, rules, measure.float32_settings("cpu"))
    found = layers.check_parity(case, entries)
    assert list(found) == [entry.name for entry in entries]
    assert found["published dsf"].keys() == {"output", "dsf"}
    assert found["statefeed dsf"].keys() == {"output", "dsf", "corrected"}
    assert found["statefeed calibrated"].keys() == {"output", "corrected"}


KINDS = {
    "packed": {"packed": True},
    "stacked": {"layers": 2, "bidirectional": True},
    "packed and stacked": {"layers": 2, "bidirectional": True, "packed": True},
    "forward": {"training": False, "packed": True},
    "projected": {"projection": 5, "layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_holds_for_every_kind_of_input(kind, dtype):
    case = layers.Case("lstm", Shape(20, 3, 8), dtype, "cpu", **KINDS[kind])
    rules = layers.rules_for(case, "dsf,bptt,jacobian+1")
    entries = layers.contenders(case, rules, layers.settings_for(case, measure.float32_settings("cpu")))
    found = layers.check_parity(case, entries)
    packed, training = case.packed, case.training
    assert rules == (["dsf", "bptt", "jacobian+1"] if training else ["bptt"])
    assert {entry.implementation for entry in entries} == {"torch.nn", "statefeed"} | (
        {"torch.nn padded"} if packed else set()
    )
    assert found["statefeed bptt"].keys() == ({"output", "corrected"} if training else {"output"})
    for entry in entries:
        seconds = entry.once(case.data(4, padded=entry.padded))
        assert len(seconds) == (2 if training else 1)
        assert min(seconds) > 0


class Unmasked(sf.GRU):
    """Runs packed sequences as if all were as long as the first."""

    def forward(self, input, hx=None):
        padded, lengths = nn.utils.rnn.pad_packed_sequence(input)
        y, final = super().forward(padded.flip(0), hx)
        return nn.utils.rnn.pack_padded_sequence(y.flip(0), lengths), final


def test_parity_of_packed_sequences_catches_a_planted_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sf, "GRU", Unmasked)
    code, _ = run(tmp_path, "layers", "--smoke", "--packed", "--cells=gru", "--rules=dsf", "--dtypes=float32")
    assert code == 1
    assert "gru 5x2x16 float32 packed: the output y of statefeed dsf must agree" in capsys.readouterr().err


def test_padded_and_packed_input_are_the_same_sequences():
    case = layers.Case("gru", Shape(9, 3, 4), "float32", "cpu", packed=True)
    packed, padded = case.data(), case.data(padded=True)
    rows = nn.utils.rnn.pack_padded_sequence(padded.x, torch.tensor([9, 7, 5]))
    assert torch.equal(rows.data, packed.x)
    assert torch.equal(rows.batch_sizes, packed.batch_sizes)
    assert case.rows == len(packed.x) == 21
    valid = torch.arange(9)[:, None] < torch.tensor([9, 7, 5])
    assert not padded.grad[~valid].any()
    # The products of 21 rows with (H, 3 H): 5 of them, or 2 forward.
    assert case.flops == 5 * 2 * 21 * 4 * 12
    assert case._replace(training=False).flops == 2 * 2 * 21 * 4 * 12
    # A second layer reads both directions: 2 * (3 * 4 + 2 * 4) + 2 * (3 * 8 + 2 * 4) columns.
    assert case._replace(layers=2, bidirectional=True).flops == 2 * 21 * 12 * (40 + 64)


def test_records_say_what_was_measured(tmp_path, capsys):
    flags = ["--packed", "--layers=2", "--bidirectional", "--pass=training,forward", "--dtypes=float64"]
    code, output = run(tmp_path, "layers", "--smoke", "--cells=gru", "--rules=dsf,bptt", *flags)
    assert code == 0, capsys.readouterr().err
    records = [json.loads(line) for line in output.read_text().splitlines()]
    for r in records:
        assert (r["packed"], r["layers"], r["bidirectional"], r["dtype"]) == (True, 2, True, "float64")
        assert r["rows"] < r["T"] * r["B"] or r["B"] == 1
        assert ("backward_ms" in r) == (r["pass"] == "training")
        assert list(r["times_faster_than"]) == ["torch.nn as shipped", "torch.nn at its best", "torch.nn padded"]
    assert {r["pass"] for r in records} == {"training", "forward"}
    assert {r["variant"] for r in records if r["implementation"] == "statefeed" and r["pass"] == "forward"} == {"bptt"}
    assert "2 layers bidirectional packed forward" in capsys.readouterr().out


# Numbers -------------------------------------------------------------------------------------------------------------


def test_contenders_take_turns():
    turns = []
    work = {name: lambda name=name: (turns.append(name), float(len(turns)))[1:] for name in "abc"}
    seconds = measure.interleaved(work, 2)
    assert "".join(turns) == "abc" + "abc" + "cba"  # one unmeasured round, then there and back
    assert seconds == {"a": [(4.0,), (9.0,)], "b": [(5.0,), (8.0,)], "c": [(6.0,), (7.0,)]}


def test_ratios_are_per_repetition_and_the_best_setting_has_the_best_median(monkeypatch):
    turns = {  # forward, backward
        "torch.nn as shipped": [(1.0, 5.0), (2.0, 6.0), (1.0, 6.0)],
        "torch.nn oneDNN matmul": [(1.0, 3.0), (1.0, 5.0), (1.0, 4.0)],
        "torch.nn no oneDNN": [(1.0, 1.0), (9.0, 9.0), (9.0, 9.0)],
        "published dsf": [(4.0, 4.0)] * 3,
        "statefeed dsf": [(1.0, 1.0), (2.0, 2.0), (1.0, 3.0)],
    }
    monkeypatch.setattr(layers, "interleaved", lambda contenders, _: {name: turns[name] for name in contenders})
    case = layers.Case("lstm", Shape(3, 2, 4), "float32", "cpu")
    entries = layers.contenders(case, ["dsf"], [measure.SHIPPED, measure.ONEDNN_MATMUL, measure.NO_ONEDNN])
    rates = {"float32": {"gflops": 1e-3, "product": "1x1x1", "setting": "as shipped"}}
    records = {f"{r['implementation']} {r['variant']}": r for r in layers.compare(case, entries, 3, rates)}
    assert list(records) == list(turns)
    ours = records["statefeed dsf"]
    assert ours["ms"] == {"median": 4000.0, "min": 2000.0, "max": 4000.0}
    assert ours["backward_us_per_step"]["median"] == pytest.approx(2e6 / 3)
    assert ours["torch_nn_best"] == "oneDNN matmul"
    assert ours["times_faster_than"]["torch.nn as shipped"] == {"median": 2.0, "min": 1.75, "max": 3.0}
    assert ours["times_faster_than"]["torch.nn at its best"] == {"median": 1.5, "min": 1.25, "max": 2.0}
    assert ours["times_faster_than"]["published"] == {"median": 2.0, "min": 2.0, "max": 4.0}
    # 5 units of 2 * T * B * H * G * H flops at a million a second
    assert ours["limit_ms"] == pytest.approx(5 * 2 * 3 * 2 * 4 * 4 * 4 / 1e3)
    assert ours["part_of_limit"] == pytest.approx(ours["limit_ms"] / 4000)


def test_a_setting_that_computes_in_bfloat16_is_no_float32_baseline(monkeypatch):
    errors = {measure.SHIPPED: 4e-5, measure.ONEDNN_MATMUL: 0.19, measure.NO_ONEDNN: 5e-5}
    monkeypatch.setattr(measure, "product_error", errors.__getitem__)
    assert measure.float32_settings("cpu") == [measure.SHIPPED, measure.NO_ONEDNN]


GPU = {dtype: measure.usual("cuda", dtype) for dtype in layers.DTYPES["cuda"]}


@pytest.mark.parametrize("setting", [measure.SHIPPED, measure.ONEDNN_MATMUL, measure.NO_ONEDNN, *GPU.values()])
def test_settings_are_restored(setting):
    def state():
        cpu = torch.backends.mkldnn
        return cpu.enabled, cpu.matmul.fp32_precision, *flags().values()

    before = state()
    with measure.applied(setting):
        assert (state() == before) == (setting == measure.SHIPPED)
    assert state() == before


def test_on_a_gpu_float32_is_float32_and_tf32_is_a_dtype_of_its_own():
    for dtype, setting in GPU.items():
        with measure.applied(setting):
            found = {value for name, value in flags().items() if name.endswith("fp32_precision")}
        assert found == {"tf32" if dtype == "tf32" else "ieee"}
        case = layers.Case("gru", Shape(3, 2, 4), dtype, "cuda")
        assert layers.settings_for(case, measure.float32_settings("cuda")) == [setting]
    case = layers.Case("gru", Shape(3, 2, 4), "tf32", "cpu")  # one that can be made here
    entries = layers.contenders(case, ["dsf", "gate"], [GPU["tf32"]])
    assert [entry.name for entry in entries] == [
        "torch.nn cuDNN",
        "published dsf",
        "statefeed dsf",
        "statefeed gate",
    ]
    assert {entry.setting for entry in entries} == {GPU["tf32"]}
    assert not any(entry.autocast for entry in entries)


def test_growth_is_the_exponent_of_time_in_T(monkeypatch):
    def quadratic(contenders, _):
        for work in contenders.values():
            work()
        return {name: [(float(lengths[0] ** 2),)] for name in contenders}

    lengths = []
    problem = scan.problem
    monkeypatch.setattr(scan, "problem", lambda T, *args: lengths.insert(0, T) or problem(T, *args))
    monkeypatch.setattr(scan, "interleaved", quadratic)
    records = list(scan.run(scan.Options(steps="16,4", widths="3", methods="prefix")))
    assert [(r["T"], r["diagonal"], r.get("growth")) for r in records] == [
        (4, "stationary", None),
        (16, "stationary", pytest.approx(2.0)),
        (4, "varying", None),
        (16, "varying", pytest.approx(2.0)),
    ]


def test_a_scan_that_would_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(scan, "free_bytes", lambda _: 99 * 8 * 3)
    records = list(scan.run(scan.Options(steps="8", widths="3")))
    assert [r["method"] for r in records if "not_run" in r] == ["fft"]
    assert len(scan.table(records).rows) == len(records) == 7


def test_the_published_procedure_holds_more_memory_than_the_outputs():
    """The peak includes memory that autograd saves, not only the outputs."""
    case = layers.Case("gru", Shape(64, 32, 64), "float32", "cpu")
    outputs = 4 * 64 * 32 * 64
    peak = memory.in_new_process(case, "dsf", 1)
    # autograd keeps h before, three gates' products twice, r, z and n for every step
    assert 8 * outputs < peak < 80 * outputs


# The command ---------------------------------------------------------------------------------------------------------


def test_the_layers_fit_a_terminal_of_80_columns(tmp_path, capsys, monkeypatch):
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Console, "is_terminal", True)
    code, _ = run(tmp_path, "layers", "--smoke", "--cells=gru", "--rules=dsf,bptt", "--dtypes=float32")
    assert code == 0
    printed = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    lines = [line for line in printed.splitlines() if line[:1] in tuple("┏┃┡│└")]
    assert max(map(len, lines)) <= 80
    assert any("statefeed dsf" in line for line in lines)
    assert any("gru 5x2x16 float32" in line for line in lines)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_smoke(benchmark, tmp_path, capsys):
    flags = ["--threads=2"] if benchmark == "scan" else ["--cells=gru", "--rules=dsf"]
    code, output = run(tmp_path, benchmark, "--smoke", *flags)
    assert code == 0, capsys.readouterr().err
    assert torch.get_num_threads() == 1
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert records
    for record in records:
        assert record["bench"] == benchmark
        assert record["command"] == " ".join(["statefeed bench", benchmark, "--smoke", *flags, f"--output={output}"])
        assert (record["threads"], record["repeats"]) == (2 if benchmark == "scan" else 1, 1)
        assert record["machine"]["cpu"]
        assert record["versions"] == {
            "python": record["versions"]["python"],
            "torch": torch.__version__,
            "statefeed": sf.__version__,
        }
        assert {"commit", "dirty", "date", "denormals", "T", "dtype", "device"} <= record.keys()
        numbers = record["peak_bytes" if benchmark == "memory" else "ms"]
        assert numbers["min"] <= numbers["median"] <= numbers["max"]
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "records in" in capsys.readouterr().out


def test_a_second_run_replaces_the_records(tmp_path):
    for _ in range(2):
        _, output = run(tmp_path, "scan", "--smoke", "--methods=sequential")
    assert len(output.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("stop", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "statefeed bench: interrupted: the records printed so far are saved\n"),
        (OSError(28, "No space left on device", "bench.jsonl"), 2, "bench: bench.jsonl: No space left on device\n"),
    ],
)
def test_an_interrupted_benchmark_prints_one_line_and_keeps_its_records(
    stop, code, sentence, tmp_path, capsys, monkeypatch
):
    def interrupted(options):
        yield {"bench": "scan"}
        raise stop

    monkeypatch.setattr(scan, "run", interrupted)
    output = tmp_path / "bench.jsonl"
    assert main(["scan", "--smoke", f"--output={output}"]) == code
    assert capsys.readouterr().err.endswith(sentence)
    assert len(output.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "one of {layers,scan,memory,training,recall"),
        (["train"], "training"),
        (["layer"], ": did you mean layers?"),
        (["layers", "--shape=1x2x3"], ": did you mean --shapes?"),
        (["layers", "--pass=backward"], "pass must be among training, forward"),
        (["layers", "--layers=0"], "layers must be at least 1"),
        (["layers", "--packed", "--shapes=1x2x3"], "packed shapes must have at least 2 steps"),
        (["layers", "--shapes=1x2"], "shapes must be TxBxH"),
        (["layers", "--shapes=0x2x3"], "shapes must be TxBxH"),
        (["layers", "--cells=gru,tcn"], "cells must be among rnn, gru, lstm"),
        (["layers", "--cells=GRU"], "got 'GRU': did you mean gru?"),
        (["layers", "--rules=fast"], "feedback must be"),
        (["layers", "--cells=rnn", "--rules=gate,gate+1"], "it has no gate"),
        (["memory", "--cells=rnn", "--rules=gate"], "it has no gate"),
        (["layers", "--dtypes=int8"], "dtypes must be among"),
        (
            ["layers", "--dtypes=tf32"],
            "dtypes must be among float32, float64, bfloat16, separated by commas, got 'tf32'",
        ),
        (["layers", "--repeats=4"], "repeats must be at least 5"),
        (["layers", "--repeats=many"], "repeats"),
        (["layers", "--threads=0"], "threads must be at least 1"),
        (["layers", "--output=records.csv"], ".jsonl"),
        (["layers", "--output=no/such/folder.jsonl"], "in an existing folder"),
        (["scan", "--steps=64,0"], "steps must be integers"),
        (["scan", "--widths=wide"], "widths must be integers"),
        (["scan", "--methods=newton"], "methods must be among"),
        (["scan", "--device=tpu"], "device"),
        (["recall", "--length=1"], "length must be at least 2"),
        (["recall", "--rules=fast"], "feedback must be"),
        (["recall", "--delay=24"], "unrecognized arguments: --delay=24"),
        (["tracking", "--length=20"], "length must be a multiple of every, 6, got 20"),
    ],
)
def test_a_user_error_prints_one_line(flags, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert sentence in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_raises():
    with pytest.raises(OptionError, match="torch sees no GPU"):
        layers.Options(device="cuda")


@pytest.mark.parametrize("package", ["jsonargparse", "rich", "matplotlib"])
def test_a_missing_dependency_prints_one_line(package, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert main(["scan", "--smoke"]) == 2
    assert capsys.readouterr().err == (
        f'statefeed bench: the benchmarks need {package}, which is not installed: pip install "statefeed[lm]"\n'
    )
