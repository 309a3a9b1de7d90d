"""Several processes of one job: the same losses as one, resume included, and an end when one of them dies."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics

from statefeed.lm.compare.commands import compare
from statefeed.lm.config import Train
from statefeed.lm.data.batches import IGNORED, Batch
from statefeed.lm.errors import UsageError
from statefeed.lm.run import tensor_file
from statefeed.lm.run.distributed import Group, shard_batch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo")

# float32 sums in another order: relative difference of a loss after a few dozen steps.
SAME_LOSS = 1e-5


def launch(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    head = [sys.executable, "-u", "-m"]
    if processes > 1:
        head += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.Popen(
        [*head, "statefeed", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def assert_same_losses(ours: Path, theirs: Path, tolerance: float = SAME_LOSS) -> None:
    a, b = metrics(ours), metrics(theirs)
    assert [(row["split"], row["step"]) for row in a] == [(row["split"], row["step"]) for row in b]
    torch.testing.assert_close(
        torch.tensor([row["loss"] for row in a]), torch.tensor([row["loss"] for row in b]), rtol=tolerance, atol=0
    )


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Whole tensors under the same names, however they were held."""
    for name in ("weights.safetensors", "checkpoints/step-000000026.safetensors"):
        (a, _), (b, _) = (tensor_file.read(folder / name) for folder in (ours, theirs))
        assert {key: (value.shape, value.dtype) for key, value in a.items()} == {
            key: (value.shape, value.dtype) for key, value in b.items()
        }


SENTENCES = ["--data.tokens=word", "--data.batches=sentences", "--train.optimizer=sgd", "--train.lr=0.5"]
FSDP = "--train.parallel=fsdp"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(["--model.feedback=calibrated+1", "--model.layers=1"], id="ddp-stream"),
        pytest.param([*SENTENCES, "--train.batch=26"], marks=slow, id="ddp-sentences"),
        pytest.param([FSDP, "--model.feedback=dsf@0.5/calibrated+1", "--model.cell=lstm"], id="fsdp-stream"),
        # The last step of an epoch has one sentence: the second process holds its weights out and reads none.
        pytest.param([FSDP, *SENTENCES, "--train.batch=40", "--train.accumulate=2"], marks=slow, id="fsdp-sentences"),
        pytest.param([FSDP, "--model.block=prenorm", "--train.precision=bfloat16"], marks=slow, id="fsdp-bfloat16"),
        pytest.param([FSDP, "--model.feedback=bptt", "--train.eval_batch=1"], marks=slow, id="fsdp-bptt"),
    ],
)
def test_two_processes_have_the_losses_of_one_and_resume_exactly(
    kind: list[str], flags: list[str], tmp_path: Path
) -> None:
    flags = [*flags, *kind, "--train.steps=26"]
    runs = {
        "one": launch(*flags, f"--run.dir={tmp_path / 'one'}", processes=1),
        "two": launch(*flags, f"--run.dir={tmp_path / 'two'}"),
    }
    for process in runs.values():
        code, out, err = finished(process)
        assert code == 0, err
    assert f" on cpu, 2 processes ({'fsdp' if FSDP in kind else 'ddp'}), feedback " in out
    assert_same_losses(tmp_path / "two", tmp_path / "one", 1e-3 if "--train.precision=bfloat16" in kind else SAME_LOSS)
    assert_same_files(tmp_path / "two", tmp_path / "one")

    stopped = tmp_path / "stopped"
    process = launch(*flags, "--run.checkpoint_minutes=0", f"--run.dir={stopped}")
    while len(list(stopped.glob("checkpoints/step-*.safetensors"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, _, err = finished(process)
    assert len(metrics(stopped)) < len(metrics(tmp_path / "two"))
    assert err.count("statefeed: interrupted after step ") == 1
    code, _, err = finished(launch("--resume", f"--run.dir={stopped}"))
    assert code == 0, err
    assert metrics(stopped) == metrics(tmp_path / "two")


@pytest.mark.slow
def test_a_run_is_resumed_with_another_number_of_processes(flags: list[str], tmp_path: Path) -> None:
    """One checkpoint for all: begun sharded over two, gone on in one, and the other way round."""
    flags = [*flags, "--train.steps=26", "--run.checkpoint_minutes=0", "--run.checkpoints=99"]
    assert finished(launch(*flags, f"--run.dir={tmp_path / 'one'}", processes=1))[0] == 0
    assert finished(launch(*flags, FSDP, f"--run.dir={tmp_path / 'two'}"))[0] == 0
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    for begun, more, processes in (("one", [FSDP], 2), ("two", ["--train.parallel=ddp"], 1), ("two", [], 2)):
        folder = tmp_path / f"{begun}-{processes}"
        shutil.copytree(tmp_path / begun, folder)
        for path in sorted((folder / "checkpoints").iterdir())[13:]:
            path.unlink()
        code, out, err = finished(launch("--resume", f"--run.dir={folder}", *more, processes=processes))
        assert code == 0, err
        assert "resuming after step 13\n" in out
        assert_same_losses(folder, tmp_path / begun)
        assert_same_files(folder, tmp_path / begun)


@pytest.mark.parametrize(
    ("rank", "parallel"),
    [pytest.param(0, "ddp", marks=slow), (1, "ddp"), pytest.param(1, "fsdp", marks=slow)],
)
def test_a_dead_process_ends_the_job_with_a_clear_error(
    rank: int, parallel: str, flags: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    more = ["--train.steps=1000000", "--train.evaluations=1", "--run.checkpoint_minutes=0"]
    more.append(f"--train.parallel={parallel}")
    process = launch(*flags, *more, f"--run.dir={folder}")
    while len(list(folder.glob("checkpoints/step-*.safetensors"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {child: Path(f"/proc/{child}/environ").read_bytes() for child in children}
    (victim,) = (int(child) for child, text in environments.items() if f"\0RANK={rank}\0".encode() in b"\0" + text)
    os.kill(victim, signal.SIGKILL)
    code, _, err = finished(process)
    assert code != 0
    sentence = re.search(r"^statefeed: process \d of 2: another process of the job ended; (.*)$", err, re.MULTILINE)
    assert sentence, err
    assert sentence[1].startswith(f"{folder} keeps the checkpoint of step ")
    assert re.search(r"; resume with `\S*(python\S* -m )?statefeed train --resume ", sentence[1])


def test_a_batch_that_cannot_be_split_raises(flags: list[str], tmp_path: Path) -> None:
    code, _, err = finished(launch(*flags, "--train.batch=5", f"--run.dir={tmp_path / 'run'}"))
    assert code != 0
    assert (
        err.count("statefeed: train.batch must be a multiple of train.accumulate times the processes of the job, 2")
        == 1
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "got no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "must be a number of processes, got two"),
        ({"WORLD_SIZE": "0"}, "must be a number of processes, got 0"),
    ],
)
def test_an_incomplete_environment_raises(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=sentence), Group.join(Train()):
        pass


def test_compare_refuses_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    work = compare(["--feedback=bptt", f"--out={tmp_path / 'runs'}"])
    with pytest.raises(UsageError, match="start it without torchrun"):
        work()
    assert not (tmp_path / "runs").exists()


def test_every_sequence_is_read_once() -> None:
    for total in (1, 2, 5, 12):
        for size in (1, 2, 3):
            for parts in (1, 2):
                read = [
                    i
                    for rank in range(size)
                    for part in Group(rank, size).columns(total, parts)
                    for i in range(total)[part]
                ]
                assert read == list(range(total))


def test_states_are_sharded_and_gathered() -> None:
    group = Group()
    states = [torch.randn(1, 6, 3), (torch.randn(1, 6, 3), torch.randn(2, 6, 3))]
    parts = [group.shard(states, part) for part in group.columns(6, 3)]
    whole = group.gather(parts)
    torch.testing.assert_close(whole, states)


def test_part_of_a_batch() -> None:
    batch = Batch(torch.arange(6).view(2, 3), torch.full((2, 3), IGNORED), torch.tensor([2, 1, 2]), True)
    part = shard_batch(batch, slice(1, 3))
    assert part.inputs.tolist() == [[1, 2], [4, 5]]
    assert part.lengths is not None
    assert part.lengths.tolist() == [1, 2]
    nothing = shard_batch(batch, slice(3, 3))
    assert nothing.inputs.tolist() == [[0], [3]]
    assert nothing.targets.tolist() == [[IGNORED], [IGNORED]]
