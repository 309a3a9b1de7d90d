"""The record of a run says which kernels run its layers, and its picture which machine drew it."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure

import statefeed as sf
from statefeed.lm import cli
from statefeed.lm import recipe as recipes
from statefeed.lm.run import curves, kernel_paths, metadata
from statefeed.lm.run.device import autocast_context
from statefeed.lm.run.distributed import Group, shard_batch
from statefeed.lm.run.setup import prepare

WORDS = ("forward", "backward", "why")


@pytest.mark.parametrize(
    "more",
    [
        ["--model.feedback=bptt"],
        ["--model.feedback=bptt", "--train.context=1", "--train.state_reset_prob=0"],  # torch's own path
        ["--model.feedback=dsf@0.5/bptt", "--model.cell=lstm", "--train.precision=bfloat16", "--train.accumulate=2"],
        ["--model.feedback=gate@0.2/calibrated@0.6/torch", "--model.block=prenorm", "--model.layers=3"],
        ["--model.cell=slstm", "--model.block=xlstm", "--model.heads=2", "--model.feedback=bptt"],
        ["--data.tokens=word", "--data.batches=sentences", "--model.feedback=bptt", "--model.cell=lstm"],
    ],
)
def test_the_paths_are_those_of_a_training_step(more: list[str], flags: list[str]) -> None:
    """The truth is `sf.explain` on the very inputs that the layers get in a step of the trainer."""
    config = recipes.build(recipes.parse(recipes.parser("test"), [*flags, *more]))
    setup = prepare(config, False, Group())
    batch = next(setup.source.epoch(0))
    found = kernel_paths.kernel_paths(setup.model, config, batch, Group())
    assert {str(m.feedback) for m in setup.model.modules() if isinstance(m, sf.FeedbackLayer)} == {
        str(sf.Schedule(config.model.feedback).at(0.0))
    }
    expected: list[dict[str, Any]] = []

    def explained(name: str) -> Any:
        def hook(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            path = sf.explain(layer, inputs[0])
            expected.append({"layer": name, "rule": path.rule, **{word: getattr(path, word) for word in WORDS}})

        return hook

    part = Group().columns(batch.inputs.shape[1], config.train.accumulate)[0]
    for rule in (rule for _, rule in sf.Schedule(config.model.feedback).stages):
        model = copy.deepcopy(setup.model)
        for name, layer in model.named_modules():
            if isinstance(layer, sf.FeedbackLayer):
                layer.feedback = rule
                layer.register_forward_pre_hook(explained(name))
        with autocast_context(config.train.precision, torch.device("cpu")):
            model.loss(shard_batch(batch, part))
    assert found == expected
    assert len(found) == config.model.layers * len(sf.Schedule(config.model.feedback).stages)
    if config.train.context == 1:
        assert {entry["forward"] for entry in found} == {"torch.nn's own path"}


def test_a_run_records_them_at_its_start_and_again_where_they_change(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = metadata.read(run)
    assert [(entry["layer"], entry["rule"]) for entry in record["paths"]] == [
        ("blocks.0.rnn", "bptt"),
        ("blocks.1.rnn", "bptt"),
    ]
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert metadata.read(folder) == record  # they are the same
    other = [{**record["paths"][0], "forward": "other kernels"}]
    monkeypatch.setattr("statefeed.lm.run.train.kernel_paths", lambda *_: other)
    for _ in range(2):
        assert cli.main(["train", "--resume", str(folder)]) == 0
        assert metadata.read(folder) == {**record, "continued": [{"step": 12, "paths": other}]}


def test_a_run_of_a_version_without_them_is_read_and_resumed(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "lm" / "run" / "old_run", folder)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("story.txt", str(text)))
    assert "paths" not in metadata.read(folder)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    (paths,) = [part["paths"] for part in metadata.read(folder)["continued"] if "paths" in part]
    assert {entry["rule"] for entry in paths} == {"calibrated"}


def test_a_model_without_recurrent_layers_has_none(flags: list[str]) -> None:
    more = ["--model.cell=mingru", "--model.feedback=bptt"]
    config = recipes.build(recipes.parse(recipes.parser("test"), [*flags, *more]))
    setup = prepare(config, False, Group())
    assert kernel_paths.kernel_paths(setup.model, config, next(setup.source.epoch(0)), Group()) == []


def test_the_picture_of_a_run_names_machine_and_threads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = list[str]()

    def saved(figure: Figure, *_: Any, **__: Any) -> None:
        titles.append(figure.get_suptitle())
        assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() for axes in figure.axes)

    monkeypatch.setattr(Figure, "savefig", saved)
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    record = json.loads((folder / "record.json").read_text())
    elsewhere = {"step": 12, "machine": "a CPU, 64 cores, Linux", "threads": 5}
    (folder / "record.json").write_text(json.dumps({**record, "continued": [elsewhere]}))
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert set(titles) == {f"{metadata.where(record)}, then a CPU, 5 threads"}
    curves.draw({"train": [(1, 2.0)], "valid": [], "test": []}, tmp_path / "x.png", "m, 1 thread")
    assert titles[-1] == "m, 1 thread"
