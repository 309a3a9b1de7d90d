"""The run folder: weights are replaced whole or not at all, and a folder that is no run is refused."""

import shutil
from pathlib import Path

import pytest
import torch

from statefeed.lm import checkpoint
from statefeed.lm.config import Model, UsageError
from statefeed.lm.evaluate import Score
from statefeed.lm.model import LanguageModel


def model(seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(Model(width=4, layers=1), 5)


def test_weights_survive(tmp_path: Path) -> None:
    checkpoint.save_weights(model(1), tmp_path)
    other = model(2)
    checkpoint.load_weights(other, tmp_path)
    for name, value in model(1).state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_save_that_fails_leaves_the_weights_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_weights(model(1), tmp_path)
    before = (tmp_path / "weights.safetensors").read_bytes()

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_weights(model(2), tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_best_keeps_the_lowest_loss(tmp_path: Path) -> None:
    best = checkpoint.Best(tmp_path)
    assert "no weights" in str(best)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, 1.5)):
        best.offer(model(step), step, 1, Score(loss, 10, 1.0, 1.0))
    kept = model(9)
    checkpoint.load_weights(kept, tmp_path)
    assert torch.equal(kept.head.weight, model(2).head.weight)
    assert str(best) == "the weights of step 2, the best so far (valid perplexity 2.72)"


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    checkpoint.refuse_taken(tmp_path)
    checkpoint.refuse_taken(tmp_path / "new")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UsageError, match="already holds a run"):
        checkpoint.refuse_taken(tmp_path)
    with pytest.raises(UsageError, match="is a file, not a folder"):
        checkpoint.refuse_taken(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.yaml", None, "is not a run folder: it holds no config.yaml"),
        ("config.yaml", b"model: {widht: 3}\n", "unknown key model.widht: did you mean model.width?"),
        ("record.json", None, "record.json cannot be read"),
        ("record.json", b"{", "record.json cannot be read"),
        ("tokenizer.json", None, "tokenizer.json cannot be read"),
        ("weights.safetensors", None, "holds no weights yet"),
        ("weights.safetensors", b"not weights", "weights.safetensors does not fit the recipe beside it"),
    ],
)
def test_a_broken_run_is_one_sentence(
    run: Path, tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError) as refused:
        checkpoint.load(folder)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_of_another_width_are_refused(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    recipe = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(recipe.replace("width: 16", "width: 8"))
    with pytest.raises(UsageError, match="does not fit the recipe beside it") as refused:
        checkpoint.load(folder)
    assert "\n" not in str(refused.value)
