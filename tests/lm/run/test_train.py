"""Training: what a run leaves, that it learns, that it repeats itself, and how it ends early."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics

from statefeed import native as kernels
from statefeed.lm import cli
from statefeed.lm import recipe as recipes
from statefeed.lm.config import Train
from statefeed.lm.run import folder as run_folder
from statefeed.lm.run import tensor_file
from statefeed.lm.run import train as training
from statefeed.lm.run.distributed import Group
from statefeed.lm.run.learning_rate import learning_rate
from statefeed.lm.run.log import Log
from statefeed.lm.run.setup import prepare

INDUCTOR = pytest.mark.filterwarnings(
    *(f"ignore::{kind}Warning" for kind in ("Deprecation", "Future", "User"))
)  # its own


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_configuration_record_tokenizer_metrics_weights_and_curves(run: Path) -> None:
    names = {"config.yaml", "record.json", "tokenizer.json", "metrics.jsonl", "weights.safetensors", "curves.png"}
    assert {path.name for path in run.iterdir()} == {*names, "checkpoints"}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000012.safetensors"]
    assert recipes.load(run / "config.yaml").train.steps == 12
    record = json.loads((run / "record.json").read_text())
    assert {len(split["sha256"]) for split in record["splits"].values()} == {64}
    assert record["threads"] == torch.get_num_threads()
    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert record["commit"] == (here.stdout.strip() or None)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_row_per_step_and_one_per_score(run: Path) -> None:
    found = rows(run)
    assert [(row["split"], row["step"]) for row in found if row["split"] != "train"] == [
        ("valid", 4),
        ("valid", 8),
        ("valid", 12),
        ("test", 12),
    ]
    assert [row["step"] for row in found if row["split"] == "train"] == list(range(1, 13))
    for row in found:
        assert {"step", "epoch", "split", "loss", "perplexity", "tokens_per_s", "seconds"} <= row.keys()
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert ("bits_per_byte" in row) == (row["split"] != "train")
        phases = {f"{phase}_ms" for phase in ("data", "forward", "backward", "optimizer")}
        assert phases & row.keys() == (phases if row["split"] == "train" else set())
        assert row["peak_bytes"] is None or row["peak_bytes"] > 1 << 20
    seconds = [row["seconds"] for row in found]
    assert seconds == sorted(seconds)


def test_a_validation_row_has_the_iterations_of_the_parallel_forward_pass(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli.main(["train", *flags, "--model.forward=newton", "--model.layers=2", f"--run.dir={folder}"]) == 0
    for row in rows(folder):
        found = [row.get(f"newton_iterations_{layer}") for layer in range(3)]
        if row["split"] == "valid":
            assert all(1 <= n <= 100 for n in found[:2])
            assert found[2] is None
        else:
            assert found == [None, None, None]


def test_it_learns(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli.main(["train", *flags, "--train.steps=120", "--train.lr=0.01", f"--run.dir={folder}"]) == 0
    first, *_, last = [row["perplexity"] for row in rows(folder) if row["split"] == "train"]
    assert last < first / 2


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(flags: list[str], run: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 1), ("other", 2)):
        assert cli.main(["train", *flags, f"--train.seed={seed}", f"--run.dir={tmp_path / name}"]) == 0
    assert metrics(tmp_path / "same") == metrics(run)
    assert metrics(tmp_path / "other") != metrics(run)


def test_epochs_begin_again_where_the_text_does(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [flag for flag in flags if "steps" not in flag]
    folder = tmp_path / "run"
    assert cli.main(["train", *few, "--train.epochs=2", "--train.context=200", f"--run.dir={folder}"]) == 0
    epochs = [row["epoch"] for row in rows(folder) if row["split"] == "train"]
    assert epochs == sorted(epochs)
    assert epochs.count(1) == epochs.count(2) == len(epochs) / 2
    assert f"{len(epochs)} steps of 4 x 200 tokens" in capsys.readouterr().out


def test_the_saved_weights_are_those_of_the_best_validation(flags: list[str], tmp_path: Path) -> None:
    """A learning rate that ruins the model after a good beginning: the last weights are not the best."""
    folder = tmp_path / "run"
    ruin = ["--train.schedule=constant", "--train.warmup=60", "--train.lr=3", "--train.steps=60", "--train.clip=null"]
    assert cli.main(["train", *flags, *ruin, "--train.evaluations=60", f"--run.dir={folder}"]) == 0
    valid = {row["step"]: row["loss"] for row in rows(folder) if row["split"] == "valid"}
    best = min(valid, key=lambda step: valid[step])
    assert best < 60
    (test,) = (row for row in rows(folder) if row["split"] == "test")
    assert test["step"] == best
    run = run_folder.load(folder)
    text = (Path(str(run.config.data.path))).read_text()
    assert run.tokenizer.size == len(set(text))


def test_a_corpus_without_test_split_reports_no_test_score(
    flags: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "given"
    corpus.mkdir()
    for split in ("train", "valid"):
        (corpus / f"{split}.txt").write_bytes(text.read_bytes())
    folder = tmp_path / "run"
    assert cli.main(["train", *flags, f"--data.path={corpus}", f"--run.dir={folder}"]) == 0
    out = capsys.readouterr().out
    assert "(given has no test split)" in out
    assert "\ntest:" not in out
    assert "test" not in {row["split"] for row in rows(folder)}
    assert cli.main(["evaluate", str(folder), "--split=test"]) == 2
    assert capsys.readouterr().err.endswith("statefeed: given has no test split, only train and valid\n")


def test_a_loss_that_is_no_number_ends_the_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    wild = ["--train.lr=1e30", "--train.clip=null", "--train.evaluations=12"]
    assert cli.main(["train", *flags, *wild, f"--run.dir={folder}"]) == 1
    err = capsys.readouterr().err
    assert "training diverged (loss " in err
    assert err.count("\n") == 1
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    assert "Infinity" not in (folder / "metrics.jsonl").read_text()


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_in_a_real_process(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--train.steps=100000", "--train.evaluations=20000", f"--run.dir={folder}"]
    command = [sys.executable, "-u", "-m", "statefeed", "train", *flags, *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("step 10 of"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        err = process.stderr.read()
    assert process.returncode == 130
    assert err.startswith("statefeed: interrupted after step ")
    assert f"{folder} keeps the checkpoint of step " in err
    assert err.count("\n") == 1
    run_folder.load(folder)


def losses(arguments: list[str], folder: Path) -> torch.Tensor:
    """Those of every step of a run."""
    assert cli.main(["train", *arguments, f"--run.dir={folder}"]) == 0
    return torch.tensor([row["loss"] for row in rows(folder) if row["split"] == "train"])


@pytest.mark.parametrize("loss", ["mean", "window"])
@pytest.mark.parametrize("batches", ["stream", "sentences"])
def test_a_batch_in_parts_is_the_same_batch(batches: str, loss: str, flags: list[str], tmp_path: Path) -> None:
    """Parts hold unlike numbers of words, and the last batch of an epoch has no four sentences; the rate is high enough
    for a part that counts too much to be seen."""
    tokens = ["--data.tokens=word", "--train.steps=110"] if batches == "sentences" else []
    rate = 0.5 if loss == "mean" else 0.05
    flags = [*flags, *tokens, f"--data.batches={batches}", f"--train.loss={loss}", "--train.optimizer=sgd"]
    flags += [f"--train.lr={rate}", "--train.clip=null", "--train.schedule=constant"]
    whole = losses(flags, tmp_path / "whole")
    assert whole[-1] < whole[0] - 0.02
    for parts in (2, 4):
        found = losses([*flags, f"--train.accumulate={parts}"], tmp_path / f"{parts}")
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("clip", [0.01, 1e3])
def test_the_gradient_is_clipped_as_torch_does(clip: float, flags: list[str], tmp_path: Path) -> None:
    """Plain gradient descent at rate 1: the change of the weights is the gradient."""
    flags = [*flags, "--train.steps=1", "--train.optimizer=sgd", "--train.lr=1", "--train.warmup=0"]
    recipe = recipes.build(recipes.parse(recipes.parser("test"), flags))
    before = prepare(recipe, False, Group()).model.state_dict()
    changes = {}
    for name in ("null", str(clip)):
        folder = tmp_path / name
        assert cli.main(["train", *flags, f"--train.clip={name}", f"--run.dir={folder}"]) == 0
        (path,) = (folder / "checkpoints").iterdir()
        after = tensor_file.read(path)[0]
        changes[name] = {key: after[f"model.{key}"] - value for key, value in before.items()}
    expected = [torch.nn.Parameter(value) for value in before.values()]
    for parameter, change in zip(expected, changes["null"].values(), strict=True):
        parameter.grad = -change
    norm = float(torch.nn.utils.clip_grad_norm_(expected, clip))
    assert 0.05 < norm < 1e3
    for parameter, change in zip(expected, changes[str(clip)].values(), strict=True):
        torch.testing.assert_close(change, -parameter.grad, rtol=0, atol=1e-7)
    found = float(torch.cat([change.flatten() for change in changes[str(clip)].values()]).norm())
    assert found == pytest.approx(min(norm, clip), rel=1e-3)


def test_losses_in_bfloat16_are_close_to_those_in_float32(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--model.block=prenorm", "--train.steps=60"]
    wide, narrow = (losses([*flags, f"--train.precision={kind}"], tmp_path / kind) for kind in ("float32", "bfloat16"))
    assert wide[-1] < wide[0] - 0.3
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, rtol=0.01, atol=0)


def test_no_step_is_charged_with_the_kernels_that_the_first_run_compiles(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def slow(device: str = "cpu") -> bool:
        if not asked:
            time.sleep(2.0)
        asked.append(device)
        return kernels.unavailable(device) is None

    monkeypatch.setattr(kernels, "available", slow)
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 0
        assert max(row["forward_ms"] for row in rows(folder) if row["split"] == "train") < 2000


def test_learning_rate() -> None:
    for schedule, middle, last in (("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, 0.000247)):
        recipe = Train(lr=1.0, warmup=100, schedule=schedule)  # type: ignore[arg-type]
        assert learning_rate(recipe, 1, 200, 0) == pytest.approx(0.01)
        assert learning_rate(recipe, 100, 200, 0) == 1.0
        assert learning_rate(recipe, 101, 200, 0) == 1.0
        assert learning_rate(recipe, 151, 200, 0) == pytest.approx(middle)
        assert learning_rate(recipe, 200, 200, 0) == pytest.approx(last, rel=1e-2)
    assert learning_rate(Train(warmup=0, lr=1.0, schedule="linear"), 1, 10, 0) == 1.0
    assert learning_rate(Train(warmup=50, lr=1.0), 20, 20, 0) == 0.4


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_a_parallel_forward_pass_has_the_same_losses(cell: str, flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, f"--model.cell={cell}", "--train.steps=6"]
    for name, method in (("sequential", "sequential"), ("newton", "newton(1e-3)")):
        assert cli.main(["train", *flags, f"--model.forward={method}", f"--run.dir={tmp_path / name}"]) == 0
    ours, theirs = (
        torch.tensor([row["loss"] for row in metrics(tmp_path / name)]) for name in ("newton", "sequential")
    )
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    assert cli.main(["evaluate", str(tmp_path / "newton")]) == 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--model.forward=newtn"], "model.feedback=bptt, model.forward=newtn: forward_method must be"),
        (["--model.forward=newton", "--model.feedback=torch"], 'does not support feedback "torch"'),
        (["--model.forward=newton", "--model.feedback=dsf@0.5/torch"], 'does not support feedback "torch"'),
    ],
)
def test_a_wrong_forward_method_raises(
    more: list[str], sentence: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *flags, *more, f"--run.dir={tmp_path / 'run'}"]) == 2
    assert sentence in capsys.readouterr().err


def test_packed_rows_are_not_compiled(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = tmp_path / "run", ["--data.tokens=word", "--data.batches=sentences", "--train.compile=default"]
    assert cli.main(["train", *flags, *words, f"--run.dir={folder}"]) == 2
    assert "train.compile must be null for data.batches=sentences with model.cell=" in capsys.readouterr().err
    assert not folder.exists()


@INDUCTOR
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_blocks_have_the_same_losses(mode: str, flags: list[str], tmp_path: Path) -> None:
    """Both rules of a schedule are compiled; scores and alignment are not."""
    torch._dynamo.reset()
    flags = [*flags, "--model.block=prenorm", "--train.alignment=true", "--train.steps=6", "--model.layers=1"]
    flags.append("--model.feedback=dsf@0.5/gate+1")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for name, more in (("plain", []), ("compiled", [f"--train.compile={mode}"])):
        assert cli.main(["train", *flags, *more, f"--run.dir={tmp_path / name}"]) == 0
    assert counters["stats"]["unique_graphs"] >= 2
    ours, theirs = (torch.tensor([row["loss"] for row in metrics(tmp_path / name)]) for name in ("compiled", "plain"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert cli.main(["train", "--resume", str(tmp_path / "compiled")]) == 0


@INDUCTOR
def test_blocks_that_cannot_be_compiled_raise_a_clear_error(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    torch._dynamo.reset()
    folder = tmp_path / "run"
    assert cli.main(["train", *flags, "--train.compile=default", f"--run.dir={folder}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("statefeed: torch.compile failed (")
    assert f"leave train.compile out; {folder} keeps no checkpoint" in err
    assert err.count("\n") == 1


def test_kernels_are_compiled_before_the_time_of_a_run_starts(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    available, enter = training.kernels.available, Log.__enter__

    def noted() -> bool:
        calls.append("kernels")
        return available()

    def entered(log: Log) -> Log:
        calls.append("log")
        return enter(log)

    monkeypatch.setattr(training.kernels, "available", noted)
    monkeypatch.setattr(Log, "__enter__", entered)
    assert cli.main(["train", *flags, "--train.steps=1", f"--run.dir={tmp_path / 'run'}"]) == 0
    assert calls[:2] == ["kernels", "log"]
