"""Where a model runs: what is wished is what is taken, float16 keeps its scale, and a GPU does what the CPU does."""

import json
from pathlib import Path

import pytest
import torch
from conftest import metrics

from statefeed.lm import cli
from statefeed.lm.config import UsageError
from statefeed.lm.run import device, kernel_paths, setup, tensor_file
from statefeed.lm.run import train as training
from statefeed.lm.run.log import Log


def test_a_device_is_resolved_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, taken in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device.resolve_device("auto").type == taken
        assert device.resolve_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match=r"train\.device must be auto or cpu here, where torch sees no GPU, got cuda"):
        device.resolve_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_silent_fallback_to_the_cpu(
    flags: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for arguments, sentence in (
        (["train", *flags, f"--run.dir={folder}", "--train.device=cuda"], "train.device must be auto or cpu here"),
        (["evaluate", str(run), "--device=cuda"], "--device must be auto or cpu here"),
        (["generate", str(run), "--device=cuda"], "--device must be auto or cpu here"),
        (
            ["train", *flags, f"--run.dir={folder}", "--train.precision=float16"],
            "train.precision=float16 needs a GPU, a CPU has bfloat16: train.device must be cuda, got cpu",
        ),
    ):
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1
    assert not folder.exists()


def test_the_device_is_in_the_record_and_the_first_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *flags, "--train.device=cpu", f"--run.dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("12 steps of 4 x 16 tokens on cpu, feedback bptt")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["device"], record["processes"]) == ("cpu", 1)


def test_products_have_the_dtype_of_the_precision() -> None:
    x = torch.randn(3, 3)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with device.autocast_context(precision, torch.device("cpu")):
            assert (x @ x).dtype == dtype


def test_float16_scales_the_loss_and_resumes_with_its_scale(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where it is refused otherwise; its products may be as they like, its scale is what counts."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    for module in (training, setup, kernel_paths):
        monkeypatch.setattr(module, "autocast_context", lambda precision, where: autocast)
    made = torch.amp.GradScaler

    def eager(kind: str, enabled: bool) -> torch.amp.GradScaler:
        """So large that steps overflow, and growing soon after."""
        return made(kind, init_scale=2.0**127, growth_interval=2, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", eager)
    flags = [*flags, "--train.precision=float16", "--train.loss=window", "--run.checkpoint_minutes=0"]
    flags += ["--run.checkpoints=99", "--train.device=cpu"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert cli.main(["train", *flags, f"--run.dir={whole}"]) == 0
    saved = [tensor_file.read(path) for path in sorted((whole / "checkpoints").iterdir())]
    scales = [metadata["scaler"]["scale"] for _, metadata in saved]
    assert scales[0] < 2.0**127  # a step that overflowed
    moved = [not torch.equal(saved[k][0]["model.head.bias"], saved[k + 1][0]["model.head.bias"]) for k in range(11)]
    assert moved == [scales[k + 1] >= scales[k] for k in range(11)]  # and was left out
    assert any(moved)

    assert cli.main(["train", *flags, f"--run.dir={again}"]) == 0
    for path in sorted((again / "checkpoints").iterdir())[6:]:
        path.unlink()
    assert cli.main(["train", "--resume", str(again)]) == 0
    assert metrics(again) == metrics(whole)
    tensors, metadata = tensor_file.read(again / "checkpoints" / "step-000000012.safetensors")
    assert metadata["scaler"] == saved[-1][1]["scaler"]
    assert all(torch.equal(tensors[name], value) for name, value in saved[-1][0].items())


def test_a_gpu_is_timed_in_its_own_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The phases are those between events, and nobody waits for the GPU but where a row is made."""
    clock, waited = [0.0], [0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            waited[0] += 1

        def elapsed_time(self, other: "Event") -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Log(tmp_path / "m.jsonl", steps=400, device=torch.device("cuda")) as log:
        for step in (1, 2):
            for phase in ("data", "forward", "backward", "optimizer"):
                clock[0] += 0.25
                log.time_phase(phase)
            assert waited == [0]
            log.step(step, 1, torch.tensor(1.0), tokens=100)
            clock[0] += 1e6  # a score
            log.time_phase(None)
    (row,) = (json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines())
    assert waited == [1]
    assert (row["forward_ms"], row["tokens_per_s"]) == (250.0, 100.0)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "transformer", "s4d", "mingru"])
def test_a_gpu_has_the_losses_of_the_cpu(cell: str, flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, f"--model.cell={cell}", "--model.heads=2"]
    flags += [] if cell in ("rnn", "gru", "lstm") else ["--model.feedback=bptt"]
    for where in ("cpu", "cuda"):
        assert cli.main(["train", *flags, f"--train.device={where}", f"--run.dir={tmp_path / where}"]) == 0
        assert cli.main(["evaluate", str(tmp_path / where), f"--device={where}"]) == 0
        assert cli.main(["generate", str(tmp_path / where), f"--device={where}"]) == 0
    losses = [torch.tensor([row["loss"] for row in metrics(tmp_path / where)]) for where in ("cpu", "cuda")]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)  # other orders of summation
    peaks = [json.loads(line)["peak_bytes"] for line in (tmp_path / "cuda" / "metrics.jsonl").read_text().splitlines()]
    assert min(peaks) > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.11 compiling for a GPU
@pytest.mark.gpu
@pytest.mark.parametrize(
    "how",
    [
        "--train.precision=bfloat16",
        "--train.precision=float16",
        "--train.accumulate=2",
        pytest.param("--train.compile=default", marks=pytest.mark.slow),
        pytest.param("--train.compile=reduce-overhead", marks=pytest.mark.slow),
    ],
)
def test_a_run_on_a_gpu_is_resumed(how: str, flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, how, "--train.device=cuda", "--run.checkpoint_minutes=0", "--run.checkpoints=99"]
    for name in ("whole", "again"):
        assert cli.main(["train", *flags, f"--run.dir={tmp_path / name}"]) == 0
    for path in sorted((tmp_path / "again" / "checkpoints").iterdir())[6:]:
        path.unlink()
    assert cli.main(["train", "--resume", str(tmp_path / "again")]) == 0
    losses = [torch.tensor([row["loss"] for row in metrics(tmp_path / name)]) for name in ("whole", "again")]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
