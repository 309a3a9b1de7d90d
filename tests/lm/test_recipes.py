"""The recipes: what the papers did, what they count, and that each trains, is scored and writes, on a tiny corpus."""

import dataclasses
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, sentences

from statefeed.lm import cli, config, migration
from statefeed.lm import recipe as recipes
from statefeed.lm.model import LanguageModel
from statefeed.lm.run import train
from statefeed.lm.run.learning_rate import learning_rate

FOLDER = ROOT / "recipes"
V = 16_000

PTB = {
    "data": {"corpus": "ptb", "tokens": "word", "vocabulary": None, "batches": "sentences"},
    "model": {"cell": "gru", "feedback": "dsf", "block": "plain", "dropout": 0.0},
    "train": {
        "epochs": 30,
        "batch": 128,
        "eval_batch": 256,
        "context": 64,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "clip": None,
        "loss": "mean",
        "evaluations": 50,
    },
}
WIKITEXT = {
    "data": {"corpus": "wikitext", "tokens": "bpe", "vocabulary": V, "batches": "blocks"},
    "model": {"block": "prenorm", "dropout": 0.0},
    "train": {
        "epochs": 5,
        "batch": 128,
        "eval_batch": 256,
        "context": 256,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "clip": None,
        "warmup": 0.1,
        "schedule": "cosine",
        "floor": 0.1,
        "evaluations": 50,
    },
}
ZAREMBA = {
    "data": {"corpus": "ptb", "tokens": "word", "vocabulary": None, "batches": "stream"},
    "model": {"cell": "lstm", "feedback": "bptt", "layers": 2, "block": "stacked"},
    "train": {"batch": 20, "loss": "window", "optimizer": "sgd", "lr": 1.0, "clip": 5.0, "state_reset_prob": 0},
}
SMALLER = {"train": {"batch": 32, "eval_batch": 64}}


def model(cell: str, layers: int, width: int) -> dict[str, dict[str, Any]]:
    feedback = "dsf" if cell in config.RECURRENT else "bptt"
    return {"model": {"cell": cell, "layers": layers, "width": width, "feedback": feedback}}


PUBLISHED: dict[str, tuple[dict[str, dict[str, Any]], ...]] = {
    **{f"ptb-gru-{n}x{w}": (PTB, model("gru", n, w)) for n, w in ((1, 256), (1, 1024), (3, 256), (3, 1024))},
    **{
        f"wikitext103-gru-{n}x{w}": (WIKITEXT, model("gru", n, w))
        for n, w in ((3, 128), (3, 256), (3, 512), (3, 1024), (1, 512), (6, 512), (12, 512))
    },
    "wikitext103-gru-3x512-context1024": (
        WIKITEXT,
        model("gru", 3, 512),
        {"train": {"context": 1024, "epochs": 20}},
    ),
    "wikitext103-rnn-3x512": (WIKITEXT, model("rnn", 3, 512), {"train": {"lr": 5e-4, "clip": 1.0}}),
    "wikitext103-lstm-3x512": (WIKITEXT, model("lstm", 3, 512)),
    "wikitext103-transformer-4x496": (WIKITEXT, model("transformer", 4, 496), {"model": {"window": 256}}),
    "wikitext103-s4d-5x504": (WIKITEXT, model("s4d", 5, 504)),
    "wikitext103-mingru-4x512": (WIKITEXT, model("mingru", 4, 512)),
    "wikitext2-gru-3x256": (WIKITEXT, SMALLER, model("gru", 3, 256)),
    "wikitext2-transformer-4x248": (WIKITEXT, SMALLER, model("transformer", 4, 248), {"model": {"window": 256}}),
    "wikitext2-s4d-5x252": (WIKITEXT, SMALLER, model("s4d", 5, 252)),
    "wikitext2-mingru-4x256": (WIKITEXT, SMALLER, model("mingru", 4, 256)),
    "wikitext2-slstm-3x256": (
        WIKITEXT,
        SMALLER,
        model("slstm", 3, 256),
        {"model": {"feedback": "gate+1", "block": "xlstm", "heads": 4, "convolution": 4}},
    ),
    "ptb-lstm-zaremba-small": (
        ZAREMBA,
        {"model": {"width": 200, "uniform": 0.1, "dropout": 0.0}, "train": {"context": 20, "epochs": 13}},
    ),
    "ptb-lstm-zaremba-medium": (
        ZAREMBA,
        {"model": {"width": 650, "uniform": 0.05, "dropout": 0.5}, "train": {"context": 35, "epochs": 39}},
    ),
}
# On the documentation of the running Python, which needs no file.
PYDOC = {"quickstart", "pydoc-slstm-2x256"}
# One of each kind of batch and cell: they are scored again and sampled from as well.
WRITING = {"pydoc-slstm-2x256", "ptb-gru-3x256", "ptb-lstm-zaremba-medium", "wikitext103-rnn-3x512"} | {
    name for name in PUBLISHED if name.startswith("wikitext2")
}


def test_every_recipe_with_a_corpus_of_its_own_is_a_published_one() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} - PYDOC == PUBLISHED.keys()


def test_the_slstm_on_pydoc_differs_from_the_quickstart_in_its_model_and_rate_only() -> None:
    quick, slstm = (recipes.load(FOLDER / f"{name}.yaml") for name in ("quickstart", "pydoc-slstm-2x256"))
    assert (slstm.data, slstm.train) == (quick.data, dataclasses.replace(quick.train, lr=6e-3))
    assert slstm.model == dataclasses.replace(quick.model, cell="slstm", feedback="gate+1", heads=4)
    assert slstm.run.dir == "runs/pydoc-slstm-2x256"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_states_the_published_values(name: str) -> None:
    recipe = recipes.load(FOLDER / f"{name}.yaml")
    expected: dict[tuple[str, str], Any] = {}
    for part in PUBLISHED[name]:
        expected |= {(section, key): value for section, keys in part.items() for key, value in keys.items()}
    assert {where: getattr(getattr(recipe, where[0]), where[1]) for where in expected} == expected
    assert recipe.run.dir == f"runs/{name}"


EFFECTIVE = [json.loads(line) for line in (Path(__file__).parent / "effective_recipes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("expected", EFFECTIVE, ids=lambda expected: expected["recipe"])
def test_a_recipe_with_its_base_equals_the_former_recipe(expected: dict[str, Any]) -> None:
    """The values are those of commit 634e57b, whose recipes named every key themselves; later keys have defaults."""
    name = expected.pop("recipe")
    values = {s: {**keys, **migration.recipe(expected)[s]} for s, keys in dataclasses.asdict(config.Config()).items()}
    assert dataclasses.asdict(recipes.load(FOLDER / f"{name}.yaml")) == values


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("ptb-gru-1x256", {0: 1e-3, 9: 1e-3, 10: 1e-4, 19: 1e-4, 20: 1e-5, 29: 1e-5}),
        ("ptb-lstm-zaremba-small", {0: 1.0, 3: 1.0, 4: 0.5, 5: 0.25, 12: 0.5**9}),
        ("ptb-lstm-zaremba-medium", {0: 1.0, 5: 1.0, 6: 1 / 1.2, 7: 1 / 1.44, 38: 1.2**-33}),
    ],
)
def test_learning_rates_of_epochs(name: str, rates: dict[int, float]) -> None:
    recipe = recipes.load(FOLDER / f"{name}.yaml").train
    steps = 100 * recipe.epochs
    for epoch, rate in rates.items():
        for step in (100 * epoch + 1, 100 * epoch + 100):
            assert learning_rate(recipe, step, steps, epoch) == pytest.approx(rate)


def test_learning_rates_of_wikitext_rise_for_a_tenth_and_fall_to_a_tenth() -> None:
    recipe = recipes.load(FOLDER / "wikitext103-gru-3x512.yaml").train
    rates = [learning_rate(recipe, step, 1000, 0) for step in range(1, 1001)]
    assert rates[:100] == pytest.approx([1e-5 * step for step in range(1, 101)])
    assert rates[550] == pytest.approx(0.55e-3, rel=1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=1e-3)


def count(recipe: config.Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(recipe.model, V).parameters())


@pytest.mark.parametrize("name", [name for name in PUBLISHED if re.search("transformer|s4d|mingru", name)])
def test_a_baseline_keeps_the_budget_that_its_recipe_states(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    stated = re.search(r"# ([\d,]+) parameters, under the budget of GRU 3x(\d+) with ([\d,]+)\.", path.read_text())
    assert stated is not None
    ours, width, budget = (int(number.replace(",", "")) for number in stated.groups())
    per_block = 6 * width**2 + 6 * width  # GRU
    per_block += width**2 + width + 8 * width**2 + 5 * width + 4 * width  # linear, mlp, two norms
    assert budget == 2 * V * width + V + 3 * per_block + 2 * width
    assert ours == count(recipes.load(path))
    assert 0.97 * budget < ours <= budget


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders in the formats of the real corpora: Penn Treebank packed, WikiText with its headings."""
    folder = tmp_path_factory.mktemp("corpora")
    lines = sentences(60).splitlines()
    for name in ("ptb", "wikitext"):
        (folder / name).mkdir()
    for split, part in (("train", lines[:40]), ("valid", lines[40:])):
        spaced = "".join(f" {line.replace('cat', '<unk>')} \n" for line in part)
        (folder / "ptb" / f"ptb.{split}.txt.xz").write_bytes(lzma.compress(spaced.encode()))
        (folder / "wikitext" / f"wiki.{split}.tokens").write_text(f" \n = Title = \n \n{spaced}")
    return folder.joinpath


@pytest.mark.parametrize("name", [*PUBLISHED, *sorted(PYDOC)])
def test_a_recipe_trains_is_scored_and_writes(
    name: str,
    corpus: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "SAMPLE", 3)  # of 150 tokens, which take longer than all the rest
    folder = tmp_path / "run"
    text = [
        "--data.corpus=text",
        "--data.vocabulary=300",
        "--data.test=0.2",
        f"--data.path={corpus('wikitext')}/wiki.train.tokens",
    ]
    small = [
        *(text if name in PYDOC else [f"--data.path={corpus(name.split('-')[0].rstrip('0123456789'))}"]),
        "--model.width=16",
        "--train.steps=2",
        "--train.batch=3",
        "--train.context=12",
        "--train.evaluations=1",
        f"--run.dir={folder}",
    ]
    assert cli.main(["train", str(FOLDER / f"{name}.yaml"), *small]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} >= {"train", "valid"}
    assert ("has no test split" in capsys.readouterr().out) == (name not in PYDOC)
    if name in WRITING:
        assert cli.main(["evaluate", str(folder)]) == 0
        valid = next(row for row in rows if row["split"] == "valid")
        assert f"perplexity {valid['perplexity']:.2f}," in capsys.readouterr().out
        assert cli.main(["generate", str(folder), "--prompt=the dog", "--tokens=5"]) == 0
        assert capsys.readouterr().out.startswith("the dog")
