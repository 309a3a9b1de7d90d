"""The run folder: weights are replaced atomically, and a folder without a run raises."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from statefeed.lm.config import Config, Model, Run, UsageError
from statefeed.lm.errors import CorruptFile
from statefeed.lm.model import LanguageModel
from statefeed.lm.run import tensor_file
from statefeed.lm.run.best import BestWeights, load_weights
from statefeed.lm.run.checkpoint import Checkpoints
from statefeed.lm.run.evaluate import Score
from statefeed.lm.run.folder import check_unused, load


def model(seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(Model(width=4, layers=1), 5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_weights_survive(folder: Path) -> None:
    BestWeights(folder).offer(model(1), 3, 1, Score(2.0, 10, 1.0, 1.0))
    other = model(2)
    load_weights(other, folder)
    for name, value in model(1).state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "weights.safetensors"]
    assert load_file(folder / "weights.safetensors").keys() == other.state_dict().keys()


def test_a_write_that_fails_leaves_the_file_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "x.safetensors"
    tensor_file.write(path, folder / "checkpoints", {"x": torch.ones(2)}, {})
    before = path.read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OSError, match="No space left") as failed:
        tensor_file.write(path, folder / "checkpoints", {"x": torch.zeros(2)}, {})
    assert (failed.value.errno, failed.value.filename) == (28, path)
    assert path.read_bytes() == before
    assert sorted(path.name for path in folder.rglob("*")) == ["checkpoints", "x.safetensors"]


TENSORS = {
    "a": torch.arange(6.0).view(2, 3).T,
    "complex": torch.ones(2, dtype=torch.complex64),
    "empty": torch.ones(0, 3),
    "narrow": torch.ones(3, dtype=torch.bfloat16),
    "number": torch.tensor(7),
}


def test_what_is_written_is_read(folder: Path) -> None:
    path = folder / "x.safetensors"
    tensor_file.write(path, folder, TENSORS, {"loss": 0.1, "rows": [1.0]})
    tensors, metadata = tensor_file.read(path)
    assert metadata == {"loss": 0.1, "rows": [1.0]}
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_no_changed_byte_goes_unnoticed(folder: Path) -> None:
    path = folder / "x.safetensors"
    tensor_file.write(path, folder, TENSORS, {"loss": 0.5})
    content = path.read_bytes()
    for place in range(8, len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            tensors, metadata = tensor_file.read(path)
        except CorruptFile:
            continue
        assert metadata == {"loss": 0.5}  # white space between the parts of the header
        assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


def test_best_keeps_the_lowest_loss(folder: Path) -> None:
    best = BestWeights(folder)
    assert "no weights" in str(best)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, 1.5)):
        best.offer(model(step), step, 1, Score(loss, 10, 1.0, 1.0))
    kept = model(9)
    load_weights(kept, folder)
    assert torch.equal(kept.head.weight, model(2).head.weight)
    assert str(best) == "the weights of step 2, the best so far (valid perplexity 2.72)"
    again = BestWeights(folder)
    assert (again.step, again.epoch, again.score) == (2, 1, best.score)


def test_a_folder_that_holds_a_run_raises(tmp_path: Path) -> None:
    check_unused(Config(run=Run(dir=str(tmp_path))))
    check_unused(Config(run=Run(dir=str(tmp_path / "new"))))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UsageError, match="already holds a run"):
        check_unused(Config(run=Run(dir=str(tmp_path))))
    with pytest.raises(UsageError, match="is a file, not a folder"):
        check_unused(Config(run=Run(dir=str(tmp_path / "config.yaml"))))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.yaml", None, "is not a run folder: it holds no config.yaml"),
        ("config.yaml", b"model: {widht: 3}\n", "unknown key model.widht: did you mean model.width?"),
        ("record.json", None, "record.json cannot be read"),
        ("record.json", b"{", "record.json cannot be read"),
        *[("record.json", content, "cannot be read: ") for content in (b"{}", b"[]", b"null")],
        ("tokenizer.json", None, "tokenizer.json cannot be read"),
        (
            "weights.safetensors",
            None,
            "holds no weights.safetensors: its training ended before the first validation, or the file was removed; an "
            "interrupted run is resumed with `statefeed train --resume ",
        ),
        ("weights.safetensors", b"not weights", "weights.safetensors is broken, perhaps by a full disk"),
    ],
)
def test_a_corrupt_run_raises_a_clear_error(
    run: Path, tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError) as refused:
        load(folder)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_of_another_width_raise(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    recipe = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(recipe.replace("width: 16", "width: 8"))
    with pytest.raises(UsageError, match="does not match the recipe of the run") as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_files_of_a_killed_write_are_removed_and_others_kept(folder: Path) -> None:
    checkpoints, kept = Checkpoints(folder, Run()), folder / "checkpoints" / ".tmp"
    kept.touch()
    for name in (".tmpA1b2C3", "x.safetensors.unfinished"):
        (folder / "checkpoints" / name).touch()
    trained = model(0)
    checkpoints.save(1, trained, torch.optim.SGD(trained.parameters()), torch.amp.GradScaler(enabled=False), None, {})
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [".tmp", "step-000000001.safetensors"]


def test_safetensors_names_its_own_file_as_expected(folder: Path) -> None:
    """The name that is removed: a process that is killed by SIGXFSZ leaves it."""
    script = (
        "import resource, torch; from safetensors.torch import save_file; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
        f"save_file({{'x': torch.ones(10000)}}, {str(folder / 'checkpoints' / 'a')!r})"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGXFSZ
    (left,) = (folder / "checkpoints").iterdir()
    assert left.match(".tmp??????")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_weights_have_the_permissions_of_other_files(folder: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        tensor_file.write(folder / "x.safetensors", folder / "checkpoints", {"x": torch.ones(2)}, {})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (folder / "x.safetensors").stat().st_mode & 0o777 == mode
