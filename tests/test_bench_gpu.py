"""GPU benchmark without a GPU: stages, parity, timing, and their records."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from tolerances import SAME_BY_CANCELLATION, assert_different, assert_same

import statefeed as sf
from statefeed.bench.gpu import __main__ as command
from statefeed.bench.gpu import forward, layers, parity, records, rivals, stage, tables, timing, training, truth
from statefeed.bench.measure import ParityError, Setting, applied

ROOT = Path(__file__).parent.parent
HAS_GPU = torch.cuda.is_available()


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"gpu-{name}.jsonl").read_text().splitlines()]


# Stages ---------------------------------------------------------------------------------------------------------------

FAILING = """
import sys
from statefeed.bench.gpu import stage
import statefeed.bench.gpu.{module} as module

def run(options):
    yield {{"fine": 1}}
    {body}

module.run = run
sys.exit(stage.main(sys.argv[1:]))
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replace the work of a stage by some lines of Python, in the process that the runner starts."""
    real, bodies = subprocess.Popen, {}

    def start(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if "statefeed.bench.gpu.stage" in arguments and (name := arguments[3]) in bodies:
            arguments = [arguments[0], "-c", FAILING.format(module=name, body=bodies[name]), *arguments[3:]]
        return real(arguments, **options)

    monkeypatch.setattr(command.subprocess, "Popen", start)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return bodies


def run(tmp_path: Path, *flags: str) -> int:
    return command.main(["--device=cpu", "--smoke", f"--output={tmp_path}", *flags])


def test_a_stage_that_fails_does_not_stop_the_others(planted: dict[str, str], tmp_path: Path, capfd) -> None:
    planted |= {
        "preflight": "raise ValueError('planted')",
        "parity": "yield {'failed': 'planted'}",
        "layers": "import os; os.abort()",
        "scan": "yield {'fine': 2}",
    }
    assert run(tmp_path, "scan", "preflight", "parity", "layers") == 1
    assert capfd.readouterr().out.splitlines()[-1] == "failed: preflight, parity, layers"
    assert [r.get("failed") for r in read(tmp_path, "preflight")] == [None, "ValueError: planted"]
    assert [r.get("failed") for r in read(tmp_path, "parity")] == [None, "planted"]
    assert [r.get("failed") for r in read(tmp_path, "layers")] == [None, "the process ended with exit code -6"]
    assert [r.get("fine") for r in read(tmp_path, "scan")] == [1, 2]
    assert not (tmp_path / "gpu-training.jsonl").exists()


def test_a_stage_that_does_not_finish_is_killed(planted: dict[str, str], tmp_path: Path) -> None:
    planted["scan"] = "import subprocess; subprocess.run(['sleep', '600'])"
    start = time.monotonic()
    assert not command.run_stage("scan", "cpu", True, tmp_path, limit=20.0)
    assert time.monotonic() - start < 300, "ended long before it would have ended"
    assert [r.get("failed") for r in read(tmp_path, "scan")] == [None, "not finished after 20 s; ended"]


def test_a_second_run_appends_its_records(planted: dict[str, str], tmp_path: Path) -> None:
    planted["scan"] = "pass"
    assert run(tmp_path, "scan") == run(tmp_path, "scan") == 0
    assert [r["fine"] for r in read(tmp_path, "scan")] == [1, 1]


def test_every_stage_ends_before_four_minutes() -> None:
    assert command.BUDGET < command.LIMIT < 240
    assert stage.STAGES == ("preflight", "parity", "layers", "scan", "training", "forward")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--device=cpu", "memory"],
            "STAGE must be among preflight, parity, layers, scan, training, forward, got memory",
        ),
        pytest.param(
            [], "device must be cpu here, got cuda: torch sees no GPU", marks=pytest.mark.skipif(HAS_GPU, reason="GPU")
        ),
    ],
)
def test_a_user_error_prints_one_line(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(flags)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_work_without_time_left_is_recorded() -> None:
    late = stage.Options("cpu", True, time.monotonic() - 1)
    for module in (parity, layers, training, forward):
        found = list(module.run(late))
        assert found
        assert {record["not_run"] for record in found} == {"no time left"}


# Records --------------------------------------------------------------------------------------------------------------


class Properties:
    name, major, minor, multi_processor_count, total_memory, uuid = "Fake GPU", 9, 0, 132, 80, "abc"


def test_a_record_has_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "nvidia-smi"
    asked.write_text(
        '#!/bin/sh\ncase "$1" in *clocks*) echo "1 MHz, 2 MHz, 3 MHz, 4 MHz, 50, 6 W, 7 W";; *) echo 550.1;; esac\n'
    )
    asked.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
    records.Records("layers", "cuda", tmp_path).append({"ms": 1.0})
    (found,) = read(tmp_path, "layers")
    assert found["command"] == "statefeed/bench/gpu.sh layers"
    assert found["gpu"]["driver"] == "550.1"
    assert found["gpu"]["clocks"]["clocks.sm"] == "1 MHz"
    assert {"cuda", "cudnn", "triton", "torch", "python"} <= found["versions"].keys()
    assert found["tf32"] == {
        "cuda.matmul.fp32_precision": "none",
        "cuda.matmul.allow_tf32": False,
        "cudnn.rnn.fp32_precision": "tf32",
        "cudnn.conv.fp32_precision": "tf32",
        "cudnn.allow_tf32": True,
        "float32_matmul_precision": "highest",
    }
    assert {"commit", "date", "machine"} <= found.keys()


# Parity ---------------------------------------------------------------------------------------------------------------

LAYERS = {
    "tanh": ("RNN", {"nonlinearity": "tanh"}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_projected": ("LSTM", {"proj_size": 2}),
    "slstm": ("SLSTM", {"num_heads": 2}),
    "slstm_exp": ("SLSTM", {"forget_gate": "exponential"}),
}


@pytest.fixture
def equations(request: pytest.FixtureRequest) -> tuple[Any, Callable[[str], tuple[dict[str, Any], dict[str, Any]]]]:
    """A layer, and gradients under a rule by the benchmark and by the loops of the tests."""
    cell = request.param
    name, special = LAYERS[cell]
    torch.manual_seed(0)
    plain = getattr(sf, name)(4, 4, dtype=torch.float64, **special)
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    weights = {key.removesuffix("_l0"): value for key, value in plain.named_parameters()}
    detached = {key: value.detach() for key, value in weights.items()}
    P = special.get("proj_size", 4)
    S = P + 4 * {"LSTM": 1, "SLSTM": 3}.get(name, 0)
    x, e = torch.randn(6, 2, 4, dtype=torch.float64), torch.randn(6, 2, S, dtype=torch.float64)
    # The outputs show h alone: the other parts get their gradient at the last step, and zero before; m gets none.
    e[:-1, :, P:] = 0
    e[..., 12:] = 0
    rest = slice(P, 12)

    def both(rule: str, other: str | float | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        leaf = x.clone().requires_grad_()
        y, final = truth.outputs(plain, rule, leaf)
        loss = (y * e[..., :P]).sum() + (final[0, :, rest] * e[-1, :, rest]).sum()
        found = dict(zip(["x", *weights], torch.autograd.grad(loss, [leaf, *plain.parameters()]), strict=True))
        diagonal, _, k = rule.partition("+")
        initial = torch.zeros(2, S, dtype=torch.float64)
        known: Any = None if rule == "bptt" else (diagonal, int(k or 0))
        if diagonal == "calibrated":
            J = oracles.jacobians(cell, detached, x, oracles.run(cell, detached, x, initial))
            known = (J.diagonal(dim1=-2, dim2=-1).mean((0, 1)), 0)
        known = known if other is None else (other, 0)
        expected = oracles.layer_gradients(cell, detached, x, initial, e, known)
        del expected["initial"]
        return found, expected

    return plain, both


RULES = ("bptt", "dsf", "dsf+2", "jacobian+1", "calibrated", "gate", "gate+1")


@pytest.mark.parametrize("equations", LAYERS, indirect=True)
def test_the_truth_is_that_of_the_equations(equations: tuple[Any, Any]) -> None:
    """Two independent implementations of the equations, in the tests and in the benchmark."""
    plain, both = equations
    for rule in RULES:
        if rule.startswith("gate") and type(plain) is sf.RNN:
            continue
        assert_same(*both(rule), SAME_BY_CANCELLATION)
        assert_different(*both(rule, 0.9))


PLANTED = {
    "the projection of the gradient": ("delta_h @ weights[4]", "delta_h @ weights[4].flip(1)", "lstm_projected"),
    "the projection of u": ("u @ w_hr.T, c]", "u.flip(-1) @ w_hr.T, c]", "lstm_projected"),
    "the place of f in D": ("(S - gate.shape[-1], 0)", "(0, S - gate.shape[-1])", "lstm_projected"),
    "dh/dn of the same step": ("-o * c / n**2]", "o * c / n**2]", "slstm"),
    "heads in reverse order": ("*gate.unbind()", "*gate.flip(0).unbind()", "slstm"),
    "no stabilizer in f": ("m_before.detach() - m,", "-m,", "slstm"),
    "the input gate": ("torch.exp(pre_i - m), f", "torch.exp(pre_i - m) * 1.01, f", "slstm_exp"),
    "the logarithm of a sigmoid": ("pre_f if exponential else", "pre_f if not exponential else", "slstm_exp"),
}


@pytest.mark.parametrize(("equations", "planted"), [(PLANTED[p][2], p) for p in PLANTED], indirect=["equations"])
def test_an_error_in_the_truth_is_found(
    equations: tuple[Any, Any], planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect.getsource(truth)
    right, wrong, _ = PLANTED[planted]
    assert source.count(right) == 1
    namespace = {"__name__": "planted"}
    exec(source.replace(right, wrong), namespace)
    monkeypatch.setattr(truth, "outputs", namespace["outputs"])
    assert_different(*equations[1]("gate"))


@pytest.mark.parametrize("case", parity.cases("cpu", smoke=True), ids=lambda c: "-".join(map(str, c[:4] + c[7:])))
def test_parity_holds_on_a_cpu(case: parity.Case) -> None:
    assert parity.check(case, "cpu").keys() == {"output", "gradient"}


@pytest.mark.parametrize("planted", ["another rule", "another weight", "a correction less"])
@pytest.mark.parametrize("packed", [False, True])
def test_parity_finds_a_planted_error(planted: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = parity.Case("gru", "gate+1", "bfloat16", packed, T=9, B=3, H=5)  # bfloat16 has the widest bounds
    right = parity.results_on_device

    def wrong(case: parity.Case, layer: Any, device: str) -> dict[str, torch.Tensor]:
        if planted == "another rule":
            layer.feedback = "ft-bptt"
        elif planted == "a correction less":
            layer.feedback = case.rule.partition("+")[0]
        else:
            with torch.no_grad():
                layer.weight_hh_l0[:, 0] += 1.0
        return right(case, layer, device)

    monkeypatch.setattr(parity, "results_on_device", wrong)
    with pytest.raises(ParityError, match="must agree with float64 within"):
        parity.check(case, "cpu")
    found = list(parity.run(stage.Options("cpu", True, time.monotonic() + 60)))
    assert len(found) == len(parity.cases("cpu", smoke=True)), "the others are compared all the same"
    wrongs = [record for record in found if "failed" in record]
    assert wrongs
    assert all(record["failed"].startswith("ParityError: ") for record in wrongs)


def test_every_cell_rule_and_dtype_is_compared_dense_and_packed() -> None:
    cases = parity.cases("cuda")
    for cell in parity.CELLS:
        for dtype in ("float64", "float32", "tf32", "bfloat16", "float16"):
            for packed in (False, True):
                rules = {c.rule for c in cases if (c.cell, c.dtype, c.packed, c.layers) == (cell, dtype, packed, 1)}
                gates = set() if cell.startswith("rnn") else {"gate", "gate+1"}
                assert rules == {"bptt", "dsf", "jacobian+1", *gates, *(() if packed else ["calibrated"])}
    assert any(case.layers == 2 and case.bidirectional and case.packed for case in cases)
    assert any(case.T > 512 for case in cases)


@pytest.mark.gpu
@pytest.mark.parametrize("case", parity.cases("cuda"), ids=lambda c: "-".join(map(str, c)))
def test_parity_holds_on_a_gpu(case: parity.Case) -> None:
    with applied(Setting(case.dtype, tf32=case.dtype == "tf32")):
        parity.check(case, "cuda")


# Timing ---------------------------------------------------------------------------------------------------------------


class Gpu:
    """Fake GPU: a pass takes two seconds on the device and one on the host; events record the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.device, self.replays, self.captures = 0.0, 0.0, 0, True
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.device, gpu.host)

            def elapsed_time(self, other: "Event") -> float:
                return 1e3 * (other.at - self.at)

        class Graph:
            def replay(self) -> None:
                gpu.replays += 1
                gpu.device += 2.0

        class Context:
            def __init__(self, *_: Any) -> None:
                if _ and isinstance(_[0], Graph) and not gpu.captures:
                    raise RuntimeError("operation not permitted when stream is capturing")

            def __enter__(self) -> None: ...

            def __exit__(self, *_: Any) -> None: ...

        class Stream:
            def wait_stream(self, _: Any) -> None: ...

        def synchronize() -> None:
            gpu.host = gpu.device = max(gpu.host, gpu.device)

        stubs = {"Event": Event, "CUDAGraph": Graph, "graph": Context, "stream": Context, "Stream": Stream}
        stubs |= {"current_stream": Stream, "synchronize": synchronize, "reset_peak_memory_stats": lambda: None}
        stubs |= {"memory_allocated": lambda: 100, "max_memory_allocated": lambda: 350}
        for name, stub in stubs.items():
            monkeypatch.setattr(torch.cuda, name, stub)
        monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)

    def work(self, slower: float = 1.0) -> timing.Work:
        def half(_: Any = None) -> torch.Tensor:
            self.host += 0.5
            self.device = max(self.device, self.host - 0.5) + slower
            return torch.zeros(())

        return timing.Work(half, half)


def test_a_pass_is_timed_pipelined_alone_on_the_host_and_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    found = timing.measure({"torch.nn": gpu.work(2.0), "dsf": gpu.work()}, 5, "cuda")
    assert found["torch.nn"]["ms"]["median"] == pytest.approx(4000.0)
    assert found["dsf"]["ms"]["median"] == pytest.approx(2000.0)
    assert found["dsf"]["times_faster_than"]["torch.nn"]["median"] == pytest.approx(2.0)
    assert found["dsf"]["host_ms"]["median"] == pytest.approx(1000.0)
    assert found["dsf"]["graph_ms"]["median"] == pytest.approx(2000.0)
    assert found["dsf"]["peak_bytes"] == 250
    assert gpu.replays == 2 * (1 + 5)


def test_failures_are_recorded_and_the_other_cases_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    gpu.captures = False

    def broken() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = timing.measure({"torch.nn": timing.Work(broken, lambda y: None), "dsf": gpu.work()}, 5, "cuda")
    assert found["torch.nn"] == {"failed": "OutOfMemoryError: CUDA out of memory"}
    assert "not permitted" in found["dsf"]["graph_failed"]
    assert "graph_ms" not in found["dsf"]
    assert found["dsf"]["ms"]["median"] == pytest.approx(2000.0)


def test_the_stage_forward_on_a_cpu() -> None:
    found = list(forward.run(stage.Options("cpu", True, time.monotonic() + 600)))
    assert len(found) == 4 * len(forward.SMOKE) * len(layers.DTYPES["cpu"])
    for record in found:
        assert "failed" not in record
        assert record["error"] < (0.03 if record["dtype"] == "bfloat16" else 1e-2)
        assert record["forward_ms"]["median"] > 0
        assert ("iterations" in record) == ("newton" in record["contender"])
    assert {r["contender"] for r in found} == {"torch.nn", "dsf sequential", "dsf newton(0.001)", "dsf newton(0.0001)"}


def test_the_most_important_cases_come_first() -> None:
    """Widths for which cuDNN has no persistent kernels, or packed input, come first; the sizes span those asked for."""
    assert all(case.H > 192 or case.packed for case in layers.DECIDING)
    cases = (*layers.DECIDING, *layers.BROAD)
    assert {64, 4096} <= {case.T for case in cases}
    assert {1, 256} <= {case.B for case in cases}
    assert {128, 2048} <= {case.H for case in cases}
    assert {1, 3} <= {case.layers for case in cases}
    assert any(case.bidirectional for case in cases)
    assert any(case.packed for case in cases)
    assert layers.RULES == ("bptt", "dsf", "gate", "gate+1")
    assert layers.DTYPES["cuda"] == ("shipped", "bfloat16", "float32", "tf32")


def test_another_package_cannot_take_all_the_time() -> None:
    with pytest.raises(TimeoutError), rivals.time_limit(0.05):
        time.sleep(60)


def test_the_model_is_that_of_the_trainer() -> None:
    from statefeed.lm import config, recipe
    from statefeed.lm.model import LanguageModel

    sizes = training.Sizes(2, 8, 50, 3, 5)
    ours = training.Model(sizes, "dsf")
    theirs = LanguageModel(config.Model(cell="gru", layers=2, width=8, block="prenorm", feedback="dsf"), 50)
    theirs.load_state_dict(ours.state_dict())
    inputs, targets = training.tokens(sizes, "cpu")
    assert (inputs[1:] == targets[:-1]).all()
    torch.testing.assert_close(ours(inputs), theirs(inputs)[0])
    published = recipe.load(ROOT / "recipes" / "wikitext103-gru-3x512.yaml")
    assert training.Sizes() == (
        published.model.layers,
        published.model.width,
        published.data.vocabulary,
        published.train.batch,
        published.train.context,
    )


# The command ----------------------------------------------------------------------------------------------------------

# Packages that an environment with only torch, triton and numpy lacks.
BARE = """
import sys

for name in ("pytest", "jsonargparse", "rich", "matplotlib", "safetensors", "tokenizers", "yaml", "hypothesis"):
    sys.modules[name] = None
"""


@pytest.mark.slow
def test_the_command_runs_without_a_gpu_and_with_torch_triton_and_numpy_alone(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    (tmp_path / "sitecustomize.py").write_text(BARE)
    output = tmp_path / "records"
    environment = {
        **os.environ, "DEVICE": "cpu", "OUT": str(output), "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)
    }  # fmt: skip
    done = subprocess.run(
        [ROOT / "statefeed" / "bench" / "gpu.sh", "--smoke"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "5 stages passed"
    for name in stage.STAGES:
        found = read(output, name)
        assert found
        assert {record["stage"] for record in found} == {name}
        assert not any("failed" in record for record in found)
    assert {record["contender"] for record in read(output, "layers")} == {"torch.nn", *layers.RULES}
    assert {record.get("method") for record in read(output, "scan")} == {"auto", "sequential", "prefix", "fft"}
    assert {record["check"]: "found" in record for record in read(output, "preflight")}["launch"]


def test_the_command_finds_an_interpreter(tmp_path: Path) -> None:
    """$PYTHON, else .venv/bin/python, else python3: never "python", which need not be there."""
    script = tmp_path / "statefeed" / "bench" / "gpu.sh"
    script.parent.mkdir(parents=True)
    script.write_text((ROOT / "statefeed" / "bench" / "gpu.sh").read_text())
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "OUT", "DEVICE")}
    environment["PATH"] = f"{tmp_path}:/usr/bin:/bin"

    def interpreter(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#!/bin/sh\necho "$0 $@"\n')
        path.chmod(0o755)

    def printed(**more: str) -> str:
        return subprocess.run(
            ["sh", script, "scan"], capture_output=True, text=True, check=True, env={**environment, **more}
        ).stdout.strip()

    rest = "-m statefeed.bench.gpu --device=cuda scan"
    interpreter(tmp_path / "python3")
    assert printed() == f"{tmp_path}/python3 {rest}"
    interpreter(tmp_path / ".venv" / "bin" / "python")
    assert printed() == f".venv/bin/python {rest}"
    interpreter(tmp_path / "other")
    expected = f"{tmp_path}/other -m statefeed.bench.gpu --device=cpu --output=/x scan"
    assert printed(PYTHON=str(tmp_path / "other"), DEVICE="cpu", OUT="/x") == expected


def test_the_layers_are_those_of_statefeed_and_torch() -> None:
    timed, kernels = layers.contenders(layers.Case("gru", 4, 3, 5, packed=True), "shipped", "cpu")
    assert list(timed) == ["torch.nn", *layers.RULES]
    assert kernels.keys() == set(layers.RULES)
    gradients = {name: work.backward(work.forward()) for name, work in timed.items()}
    for a, b, other in zip(gradients["torch.nn"], gradients["bptt"], gradients["dsf"], strict=True):
        torch.testing.assert_close(a, b)
        assert a.shape == other.shape
    assert not torch.allclose(gradients["torch.nn"][0], gradients["dsf"][0], rtol=1e-2, atol=1e-3)
    assert isinstance(layers.Case("lstm", 4, 3, 5).layer(sf, "cpu"), sf.LSTM)


RECORDS = ROOT / "results" / "bench" / "nvidia-h200"


@pytest.mark.skipif(not RECORDS.is_dir(), reason="a source distribution has no results")
def test_the_tables_of_the_documents_are_those_of_the_records() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert tables.replaced(text, RECORDS) == text, "run `make measured`"
    planted = text.replace("| gru 4096x8x512 | ", "| gru 4096x8x512 | 1", 1)
    assert tables.replaced(planted, RECORDS) == text != planted


@pytest.mark.skipif(not RECORDS.is_dir(), reason="a source distribution has no results")
@pytest.mark.parametrize("page", ["README.md", "docs/scaling.md"])
def test_figures_of_other_documents_are_in_the_tables(page: str) -> None:
    """Every row "layer or step | cuDNN | dsf (ratio)" repeats figures of the tables."""
    known = set(re.findall(r"[\d.]+", tables.tables(RECORDS)))
    section = (
        (ROOT / page).read_text(encoding="utf-8").partition("## GPU\n" if page == "README.md" else "## What the m")[2]
    )
    rows = [
        row for row in section.partition("\n## ")[0].splitlines() if row.startswith(("| gru", "| lstm", "| a step"))
    ]
    assert len(rows) >= 5
    for row in rows:
        cells = row.strip("|").split("|")[1:]
        measured = cells if page == "README.md" else cells[1::2]
        assert {f for cell in measured for f in re.findall(r"[\d.]+", cell)} <= known, row


def test_the_latest_record_counts_and_what_was_not_run_does_not(tmp_path: Path) -> None:
    records = [
        {"T": 8, "S": 4, "diagonal": "stationary", "method": "auto", "ms": {"median": 2.0}},
        {"T": 8, "S": 4, "diagonal": "stationary", "method": "auto", "ms": {"median": 3.5}},
        {"T": 8, "S": 4, "diagonal": "stationary", "method": "auto", "not_run": "no time left"},
    ]
    (tmp_path / "gpu-scan.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "| 8 x 4, stationary | 3.5 /  |" in "\n".join(tables.scan(tmp_path))


def test_a_projected_lstm_and_an_slstm_are_in_the_tables_once_they_are_measured(tmp_path: Path) -> None:
    old = {"dtype": "shipped", "cell": "lstm", "T": 8, "B": 2, "H": 4, "layers": 1, "bidirectional": False}
    old["packed"] = False

    def record(contender: str, first: str, ms: float, **more: Any) -> dict[str, Any]:
        times = {"ms": {"median": ms}, "times_faster_than": {first: {"median": 6.0 / ms}}, "peak_bytes": int(ms)}
        return {**old, "contender": contender, **times, **more}

    def rows(*records: dict[str, Any]) -> list[str]:
        (tmp_path / "gpu-layers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return list(tables.layers(tmp_path))

    lstm = [record("torch.nn", "torch.nn", 6.0), record("dsf", "torch.nn", 3.0)]
    projected = [{**r, "ms": {"median": r["ms"]["median"] + 0.5}, "proj_size": 3, "heads": 0} for r in lstm]
    slstm = [record(name, "bptt", ms, cell="slstm", proj_size=0, heads=2) for name, ms in (("bptt", 6.0), ("dsf", 2.0))]
    before = rows(*lstm)
    assert "| lstm 8x2x4 | 6.0 | 3.0 (2.00) |  |  |  |  | 0.50 |" in before
    assert not any("sLSTM" in row for row in before)
    found = rows(*lstm, *projected, *slstm)
    assert [row for row in before if row not in found] == []
    assert "| lstm 8x2x4, proj_size 3 | 6.5 | 3.5 (2.00) |  |  |  |  | 0.50 |" in found
    assert found[-1] == "| slstm 8x2x4, 2 heads, float32 as shipped | 6.0 | 2.0 (3.00) |  |  |  |  | 0.33 |"


def test_an_slstm_is_compared_with_its_own_bptt() -> None:
    timed, _ = layers.contenders(layers.Case("slstm", 4, 3, 6, heads=2), "shipped", "cpu")
    assert list(timed) == list(layers.RULES)
    assert timed["bptt"].forward().shape == (4, 3, 6)
    timed, _ = layers.contenders(layers.Case("lstm", 4, 3, 6, proj_size=2), "shipped", "cpu")
    assert list(timed) == ["torch.nn", *layers.RULES]
    torch.testing.assert_close(timed["torch.nn"].forward(), timed["dsf"].forward())
    assert timed["dsf"].forward().shape == (4, 3, 2)
