"""A run folder from a stranger: it runs no code, and its lies are sentences."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import yaml

from statefeed.lm import cli

CODE = "!!python/object/apply:os.system ['touch {mark}']"
PICKLE = b"cos\nsystem\n(S'touch {mark}'\ntR."
COMMANDS = (["evaluate"], ["generate", "--tokens=2"], ["train", "--resume"], ["report"])


@pytest.fixture
def copied(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(run, tmp_path / "run"))


def refused(folder: Path, capsys: pytest.CaptureFixture[str], commands: tuple[list[str], ...] = COMMANDS) -> None:
    for command in commands:
        capsys.readouterr()
        assert cli.main([*command, str(folder)]) == 2, command
        err = capsys.readouterr().err
        assert err.startswith("statefeed: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["config.yaml", "record.json", "tokenizer.json", "weights.safetensors"])
@pytest.mark.parametrize("content", [CODE.encode(), PICKLE, b"model: " + CODE.encode()])
def test_no_file_runs_code(
    name: str, content: bytes, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    (copied / name).write_bytes(content.replace(b"{mark}", str(mark).encode()))
    commands = COMMANDS[:3] if name in ("config.yaml", "record.json") else COMMANDS[:2]
    refused(copied, capsys, commands)
    assert not mark.exists()


def test_planted_files_run_code_if_loaded(tmp_path: Path) -> None:
    import pickle

    mark = tmp_path / "mark"
    yaml.unsafe_load(CODE.replace("{mark}", str(mark)))
    assert mark.exists()
    mark.unlink()
    pickle.loads(PICKLE.replace(b"{mark}", str(mark).encode()))
    assert mark.exists()


@pytest.mark.parametrize("size", [2**62, 2**40, 10])
def test_weights_with_wrong_sizes_raise(size: int, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = json.dumps({"head.weight": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    for length in (len(header), 2**62):
        (copied / "weights.safetensors").write_bytes(struct.pack("<Q", length) + header + b"\0" * 8)
        refused(copied, capsys, COMMANDS[:2])


def test_a_recipe_with_wrong_sizes_raises(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (copied / "config.yaml").read_text()
    for width in (10**8, 2**62, 10**20):
        (copied / "config.yaml").write_text(recipe.replace("width: 16", f"width: {width}"))
        refused(copied, capsys, COMMANDS[:2])


def test_names_of_tensors_that_climb(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = json.dumps({"../../climbed": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (copied / "weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refused(copied, capsys, COMMANDS[:2])
    assert not list(tmp_path.rglob("climbed*"))


def test_a_recipe_with_other_paths_writes_nothing_there(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of a run is where it is, whatever its recipe says."""
    recipe = yaml.safe_load((copied / "config.yaml").read_text())
    recipe["run"]["dir"] = str(tmp_path / "elsewhere")
    (copied / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["evaluate", str(copied)]) == 0
    assert cli.main(["train", "--resume", str(copied)]) == 0
    assert not (tmp_path / "elsewhere").exists()
