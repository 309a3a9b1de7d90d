"""A run that cannot be lost: killed at any moment, on a full disk, with broken files, it is resumed bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics

from statefeed.lm import cli
from statefeed.lm.config import Run, Train
from statefeed.lm.run import provenance, tensor_file
from statefeed.lm.run import train as training
from statefeed.lm.run.best import BestWeights
from statefeed.lm.run.checkpoint import Checkpoints

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, forks and mounts of POSIX")

KILLING = Path(__file__).parent / "kill_and_resume.py"
ALWAYS = "--run.checkpoint_minutes=0"
CASES = {
    "stream": ["--train.optimizer=adam", "--model.feedback=calibrated+1"],
    "schedule": ["--model.feedback=dsf@0.3/calibrated@0.6/gate+1", "--model.cell=lstm", "--train.steps=17"],
    "sentences": [
        "--data.tokens=word",
        "--data.batches=sentences",
        "--model.dropout=0.3",
        "--train.optimizer=sgd",
        "--train.lr=0.5",
        "--train.steps=110",  # more than an epoch
    ],
    "attention": ["--model.cell=transformer", "--model.feedback=bptt", "--model.window=8", "--model.heads=2"],
    "s4d": ["--model.cell=s4d", "--model.feedback=bptt", "--model.modes=4"],
    "xlstm": ["--model.cell=slstm", "--model.block=xlstm", "--model.feedback=gate+1", "--model.heads=2"],
    "bfloat16": ["--train.precision=bfloat16", "--train.accumulate=2", "--train.alignment=true"],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models, and machines that are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(flags: list[str], one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 0
    return folder


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, *numbers: int) -> None:
    """Send this process signals in the middle of a step."""
    draw = training.seed_step

    def interrupted(recipe: Train, step: int, columns: int, rank: int) -> torch.Tensor:
        for number in numbers if step == at else ():
            os.kill(os.getpid(), number)
        return draw(recipe, step, columns, rank)

    monkeypatch.setattr(training, "seed_step", interrupted)


@pytest.fixture
def stopped(flags: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Make a run that a signal stopped after a step."""

    def make(*more: str, at: int = 7, folder: Path = tmp_path / "run") -> Path:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, at, signal.SIGINT)
            assert cli.main(["train", *flags, *more, ALWAYS, f"--run.dir={folder}"]) == 130
        return folder

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a disk in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_is_resumed_bit_for_bit(
    case: str, flags: list[str], stopped: Callable[..., Path], tmp_path: Path
) -> None:
    flags = [*flags, *CASES[case]]
    whole = tmp_path / "whole"
    assert cli.main(["train", *flags, f"--run.dir={whole}"]) == 0
    folder = stopped(*CASES[case])
    assert 0 < len(metrics(folder)) < len(metrics(whole))
    assert cli.main(["train", "--resume", f"--run.dir={folder}"]) == 0
    assert metrics(folder) == metrics(whole)
    ours, theirs = (tensor_file.read(place / "weights.safetensors")[0] for place in (folder, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    last = max((folder / "checkpoints").iterdir()).name
    ours, theirs = (tensor_file.read(place / "checkpoints" / last)[0] for place in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    seconds = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)


def killed(flags: list[str], kills: int, seed: int, folder: Path) -> None:
    command = [sys.executable, str(KILLING), str(folder), str(kills), str(seed), *flags, ALWAYS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    killed, runs = map(int, done.stdout.split())
    assert killed >= kills
    for run in range(runs):
        assert metrics(folder / f"killed-{run}") == metrics(folder / "whole")


def test_a_run_killed_at_random_moments_is_resumed_bit_for_bit(flags: list[str], tmp_path: Path) -> None:
    killed([*flags, *CASES["schedule"]], kills=8, seed=random.randrange(2**32), folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_runs_killed_at_many_random_moments_are_resumed_bit_for_bit(
    case: str, flags: list[str], tmp_path: Path
) -> None:
    killed([*flags, *CASES[case]], kills=30, seed=random.randrange(2**32), folder=tmp_path)


MOMENTS = {
    "half a file": (
        "save = c.save_file\n"
        "def fatal(tensors, path, metadata):\n"
        "    save(tensors, path, metadata); path.write_bytes(path.read_bytes()[:999]); die()\n"
        "c.save_file = fatal\n"
    ),
    "a file without its name": "c.os.replace = lambda *paths: die() if 'step' in str(paths[1]) else None\n",
    "one checkpoint too many": "c.Path.unlink = lambda path, missing_ok=False: None if missing_ok else die()\n",
    "half a row": (
        "from statefeed.lm.run import log\n"
        "row = log.Log._row\n"
        "def fatal(self, step, *rest, **more): row(self, step, *rest, **more); self._file.write('{'); "
        "self._file.flush(); die()\n"
        "log.Log._row = fatal\n"
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_writing(moment: str, flags: list[str], run: Path, stopped: Callable[..., Path]) -> None:
    folder = stopped()
    code = (
        "import os, sys; from statefeed.lm import cli; from statefeed.lm.run import tensor_file as c\n"
        f"def die(): os.kill(os.getpid(), {int(signal.SIGKILL)})\n{MOMENTS[moment]}cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "train", "--resume", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(run)
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_the_last_checkpoints_are_kept(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli.main(["train", *flags, ALWAYS, "--run.checkpoints=3", f"--run.dir={folder}"]) == 0
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{step:09}.safetensors" for step in (10, 11, 12)]


def test_files_of_the_user_in_the_checkpoint_folder_are_not_removed(stopped: Callable[..., Path]) -> None:
    folder = stopped()
    last = max((folder / "checkpoints").iterdir())
    kept = folder / "checkpoints" / "kept"
    kept.mkdir()
    for copy in (kept / last.name, last.with_name("step-before-the-fall.safetensors"), last.with_suffix(".bak")):
        shutil.copy(last, copy)
    (folder / "checkpoints" / f"{last.name}.unfinished").touch()
    assert cli.main(["train", "--resume", str(folder)]) == 0
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"kept", "step-before-the-fall.safetensors", f"{last.stem}.bak"} < names
    assert f"{last.name}.unfinished" not in names
    assert (kept / last.name).is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step(
    number: int, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a run"
    interrupt(monkeypatch, 6, number)
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 128 + number
    assert capsys.readouterr().err == (
        f"statefeed: interrupted after step 6 of 12: {folder} keeps the checkpoint of step 6 and the weights of step "
        f"4, the best so far (valid perplexity {metrics(folder)[4]['perplexity']:.2f}); resume with "
        f"`statefeed train --resume '{folder}'`\n"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interruption_ends_it_at_once(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    assert cli.main(["train", *flags, f"--run.dir={tmp_path / 'run'}"]) == 130
    assert capsys.readouterr().err.startswith("statefeed: interrupted: ")
    monkeypatch.undo()
    assert cli.main(["train", *flags, f"--run.dir={tmp_path / 'run'}", "--resume"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", ["prepare", "report"])
def test_a_signal_before_or_after_the_steps_is_reported(
    phase: str,
    number: int,
    code: int,
    flags: list[str],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    before = getattr(training, phase)

    def interrupted(*arguments: object) -> object:
        os.kill(os.getpid(), number)
        return before(*arguments)

    monkeypatch.setattr(training, phase, interrupted)
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == code
    kept = f"{folder} keeps the checkpoint of step 12" if phase == "report" else "training had not begun"
    assert capsys.readouterr().err.startswith(f"statefeed: interrupted: {kept}")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    again = ["--resume"] if phase == "report" else []
    assert cli.main(["train", *flags, f"--run.dir={folder}", *again]) == 0
    assert metrics(folder) == metrics(run)


def test_no_two_processes_resume_one_run(
    stopped: Callable[..., Path], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped()
    before = (folder / "metrics.jsonl").read_text()
    capsys.readouterr()
    code = (
        "import sys; from pathlib import Path; from statefeed.lm.run.lock import lock\n"
        "with lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert cli.main(["train", "--resume", str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"statefeed: {folder} is being trained by another process: wait for its end, or choose")
        assert (folder / "metrics.jsonl").read_text() == before
        other.kill()
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(run)


@pytest.mark.parametrize("damage", ["\0", "{}", "[]", '{"split": "train"}'])
def test_damaged_metrics_are_reported(
    damage: str, stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped() / "metrics.jsonl"
    capsys.readouterr()
    first, _, rest = path.read_text().partition("\n")
    path.write_text(damage.ljust(len(first)) + "\n" + rest)
    damaged = path.read_bytes()
    assert cli.main(["train", "--resume", str(path.parent)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"statefeed: {path} is broken: a row before the checkpoint is not what was written (")
    assert err.count("\n") == 1
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"splits": 3}'])
def test_a_damaged_record_is_reported(
    content: str, stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped()
    capsys.readouterr()
    (folder / "record.json").write_text(content)
    for command in (["train", "--resume"], ["evaluate"]):
        assert cli.main([*command, str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"statefeed: {folder / 'record.json'} cannot be read: ")
        assert err.count("\n") == 1
    assert (folder / "record.json").read_text() == content


def test_the_environment_of_a_resumed_run_is_recorded(
    stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped()
    record = json.loads((folder / "record.json").read_text())
    for machine in (None, "another", "another"):
        if machine is not None:
            monkeypatch.setattr(provenance, "processor", lambda: "another")
            monkeypatch.setattr("os.cpu_count", lambda: 7)
        assert cli.main(["train", "--resume", str(folder)]) == 0
    system = record["machine"].split(", ")[-1]
    found = json.loads((folder / "record.json").read_text())
    assert found.pop("continued") == [{"step": 12, "machine": f"another, 7 cores, {system}"}]
    assert found == record


def test_every_way_to_resume(flags: list[str], run: Path, stopped: Callable[..., Path], tmp_path: Path) -> None:
    first = stopped()
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(first / "config.yaml", recipe)
    ways = {
        "the flags again": [*flags, f"--run.dir={first}", "--resume"],
        "the folder": ["--resume", f"--run.dir={first}"],
        "the folder, named alone": ["--resume", str(first)],
        "the recipe": ["--resume", str(recipe)],
        "a folder that was moved": [str(tmp_path / "moved"), "--resume"],
        "another way to keep it": ["--resume", str(first), "--run.checkpoints=5", "--run.checkpoint_minutes=1"],
    }
    backup = shutil.copytree(first, tmp_path / "backup")
    shutil.copytree(first, tmp_path / "moved")
    for arguments in ways.values():
        shutil.rmtree(first)
        shutil.copytree(backup, first)
        assert cli.main(["train", *arguments]) == 0
        assert metrics(tmp_path / "moved" if "moved" in arguments[0] else first) == metrics(run)


def test_resuming_a_missing_run_starts_it(run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(run / "config.yaml", recipe)
    for made in (False, True):
        folder = tmp_path / f"run-{made}"
        if made:
            shutil.copytree(run, folder)
            shutil.rmtree(folder / "checkpoints")
            (folder / "checkpoints").mkdir()
            (folder / "weights.safetensors").unlink()
            rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            (folder / "metrics.jsonl").write_text("".join(rows[:2]))
            record = json.loads((folder / "record.json").read_text())
            assert record.pop("checkpointed")  # killed before that
            (folder / "record.json").write_text(json.dumps(record))
        assert cli.main(["train", str(recipe), f"--run.dir={folder}", "--resume"]) == 0
        assert metrics(folder) == metrics(run)


def test_resuming_a_finished_run_changes_nothing(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(run)


def test_runs_that_cannot_be_resumed_raise(
    flags: list[str], stopped: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped()
    capsys.readouterr()
    text = tmp_path / "other.txt"
    text.write_text(Path(next(flag for flag in flags if "path" in flag).split("=")[1]).read_text() + "more\n")
    recipe = tmp_path / "moved.yaml"
    recipe.write_text((folder / "config.yaml").read_text().replace("story.txt", "other.txt"))
    for arguments, sentence in (
        (["--resume", "--run.dir=nowhere"], "nowhere holds no run to resume"),
        (
            ["--resume", str(folder), "--train.lr=1"],
            "cannot be resumed with another recipe: train.lr is 0.003 there, got 1.0",
        ),
        (["--resume", str(folder), f"--data.path={text}"], " split of other.txt has changed"),
        ([*flags, f"--run.dir={folder}"], "already holds a run: resume it with --resume"),
    ):
        assert cli.main(["train", *arguments]) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(next(f for f in flags if "path" in f).split("=")[1], str(text)))
    assert cli.main(["train", "--resume", str(folder)]) == 2
    assert " split of other.txt has changed" in capsys.readouterr().err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, alter, empty])
def test_the_previous_checkpoint_is_used_if_the_last_is_corrupt(
    damage: Callable[[Path], None], run: Path, stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped()
    before, last = sorted((folder / "checkpoints").iterdir())
    backup = before.read_bytes()
    damage(last)
    damage(before)
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert str(last) in err
    assert str(before) in err
    assert err.count("\n") == 1
    before.write_bytes(backup)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert f"{last} is broken" in (out := capsys.readouterr().out)
    assert "resuming from the checkpoint of step 6" in out
    assert metrics(folder) == metrics(run)


@pytest.mark.parametrize("damage", [truncate, alter, empty])
def test_broken_best_weights_are_named(
    damage: Callable[[Path], None], stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped()
    damage(folder / "weights.safetensors")
    capsys.readouterr()
    for command in (["train", "--resume"], ["evaluate"]):
        assert cli.main([*command, str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"statefeed: {folder / 'weights.safetensors'} is broken")
        assert err.count("\n") == 1


def test_a_full_disk(
    disk: Callable[[str], Path], run: Path, stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = disk("size=600k")
    folder = stopped(folder=place / "run")
    for left in (0, 4096, 40_000):  # too little for a row, for weights, for a checkpoint
        free = os.statvfs(place)
        filler = place / "filler"
        with filler.open("wb", buffering=0) as file:
            file.write(b"x" * (free.f_bavail * free.f_bsize - left))
        kept = max((folder / "checkpoints").iterdir())
        step = int(kept.stem[5:])
        content = kept.read_bytes()
        capsys.readouterr()
        assert cli.main(["train", "--resume", str(folder)]) == 2
        err = capsys.readouterr().err
        assert "No space left on device" in err
        best = BestWeights(folder).step
        assert f"keeps the checkpoint of step {step} and the weights of step {best}" in err
        assert "resume with `statefeed train --resume" in err
        assert err.count("\n") == 1
        assert kept.read_bytes() == content
        filler.unlink()
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(run)


def test_a_folder_that_cannot_be_written(
    disk: Callable[[str], Path], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = disk("ro,size=64k") / "run"
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 2
    assert capsys.readouterr().err == f"statefeed: {folder}: Read-only file system; training had not begun\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_out_of_memory(stopped: Callable[..., Path], run: Path) -> None:
    folder = stopped()
    code = (
        "import resource, sys, torch; from statefeed.lm import cli; from statefeed.lm.run import log\n"
        "take = log.Log.step\n"
        "def hungry(self, step, *rest):\n"
        "    take(self, step, *rest)\n"
        "    if step == 9:\n"
        "        used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)\n"
        "        hold.append(torch.ones(1 << 28))\n"
        "hold = []; log.Log.step = hungry; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", "--resume", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("statefeed: out of memory: lower train.batch or train.context, or raise ")
    assert "keeps the checkpoint of step 8 and the weights of step 8" in done.stderr
    assert done.stderr.count("\n") == 1
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(run)


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate rises a hundredfold a step, until the weights overflow."""
    folder = tmp_path / "run"
    wild = ["--train.lr=1e30", "--train.clip=null", "--train.warmup=3", "--train.optimizer=sgd"]
    assert cli.main(["train", *flags, *wild, ALWAYS, f"--run.dir={folder}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("statefeed: training diverged (")
    assert err.count("\n") == 1
    for path in (folder / "checkpoints").iterdir():
        tensors, metadata = tensor_file.read(path)
        assert f"keeps the checkpoint of step {metadata['step']}" in err
        assert all(bool(value.isfinite().all()) for name, value in tensors.items() if name.startswith("model."))


def test_unsupported_rules_raise_before_anything_is_written(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rules in ("dsf@0.5/gate", "gate@0.5/dsf", "dsf@0.3/calibrated@0.6/gate+1", "dsf@0.5/nothing", "dsf@2/bptt"):
        cell = ["--model.cell=rnn", f"--model.feedback={rules}", f"--run.dir={tmp_path / 'run'}"]
        assert cli.main(["train", *flags, *cell]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"statefeed: model.feedback={rules}: ")
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_checkpoints_hold_plain_tensors(run: Path) -> None:
    (path,) = (run / "checkpoints").iterdir()
    tensors, metadata = tensor_file.read(path)
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", "state"}
    assert metadata.keys() == {"step", "log", "scaler"}


def test_a_checkpoint_of_another_model_raises(stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped()
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("width: 16", "width: 8"))
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "does not match the recipe of the run" in err
    assert err.count("\n") == 1


def test_how_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("statefeed.lm.run.checkpoint.time.monotonic", lambda: clock[0])
    checkpoints = Checkpoints(tmp_path, Run(checkpoint_minutes=2))
    for now, due in ((0.0, False), (119.0, False), (120.0, True)):
        clock[0] = now
        assert checkpoints.due == due
    (tmp_path / "checkpoints").mkdir()
    model = torch.nn.Linear(2, 2)
    optimizer, scaler = torch.optim.Adam(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    checkpoints.save(5, model, optimizer, scaler, None, {})  # type: ignore[arg-type]
    assert not checkpoints.due
    assert str(checkpoints) == "the checkpoint of step 5"
