"""Models of equal size: which are compared, at which rate, and what is printed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from statefeed.lm import cli
from statefeed.lm.compare import markdown_runs, page
from statefeed.lm.compare.equal_size import compare_models
from statefeed.lm.compare.results import Result, to_line
from statefeed.lm.compare.sources import Found
from statefeed.lm.compare.verdicts import DEFAULT_TERMS, Terms
from statefeed.lm.config import Config, Model, Train

CODE = {"statefeed": "0.2.0", "torch": "2.13", "commit": "a" * 40, "dirty": False}
GRU, S4D = Model("gru", "bptt", block="prenorm"), Model("s4d", "bptt", width=252, block="prenorm")


def runs(
    model: Model, perplexities: list[float], parameters: int = 1_000_000, lr: float = 1e-3, **train: Any
) -> list[Result]:
    """A run for every perplexity, with the seeds 1, 2, ..."""
    return [
        Result(
            config=dataclasses.asdict(Config(model=model, train=Train(seed=seed, lr=lr, evaluations=1, **train))),
            metadata={"corpus": "made up", "parameters": parameters, "threads": 1, "machine": "m", **CODE},
            outcome="finished",
            valid=[{"step": 10, "epochs": 1.0, "seconds": 1.0, "perplexity": value}],
            alignment=[],
            ms={},
            tokens_per_s=None,
            peak_bytes=None,
            test=None,
        )
        for seed, value in enumerate(perplexities, 1)
    ]


def test_models_of_equal_size_are_compared_by_seed() -> None:
    dsf = dataclasses.replace(GRU, feedback="dsf")
    results = [
        *runs(GRU, [100.0, 102.0, 104.0]),
        *runs(dsf, [105.0, 107.1, 109.2]),
        *runs(S4D, [120.0, 122.4, 124.8], 1_049_000),
    ]
    ((title, found),) = compare_models(results, DEFAULT_TERMS).items()
    assert "made up, 1 epochs, models of 1,000,000 parameters" in title
    assert found.terms.baseline == "gru 2x256 prenorm under bptt"
    by_name = {one.name: one.differences["best validation"] for one in found.comparisons}
    assert {name: round(d.mean, 12) for name, d in by_name.items()} == {
        "gru 2x256 prenorm under dsf": 0.048790164169,  # log(1.05)
        "s4d 2x252 prenorm": 0.182321556794,  # log(1.2)
    }
    assert by_name["s4d 2x252 prenorm"].verdict() == "worse"


def test_every_model_has_its_own_rate() -> None:
    results = [
        *runs(GRU, [100.0, 102.0, 104.0]),
        *runs(S4D, [150.0, 150.0, 150.0]),
        *runs(S4D, [90.0, 91.8, 93.6], lr=2e-3),
    ]
    (found,) = compare_models(results, DEFAULT_TERMS).values()
    (s4d,) = found.comparisons
    assert s4d.grid.chosen == 2e-3
    assert s4d.differences["best validation"].verdict() == "better"


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(runs(S4D, [120.0], 1_051_000), id="more than 5% larger"),
        pytest.param(runs(S4D, [120.0], 949_000), id="more than 5% smaller"),
        pytest.param(runs(S4D, [120.0], context=128), id="trained otherwise"),
        pytest.param(runs(dataclasses.replace(GRU, feedback="dsf"), [120.0]), id="the same model"),
    ],
)
def test_other_models_are_not_compared(others: list[Result]) -> None:
    assert compare_models([*runs(GRU, [100.0]), *others], DEFAULT_TERMS) == {}


def test_models_that_differ_in_other_keys_are_not_seeds_of_one() -> None:
    fewer = dataclasses.replace(S4D, modes=8)
    results = [*runs(GRU, [100.0, 102.0]), *runs(S4D, [120.0, 122.0]), *runs(fewer, [130.0, 132.0])]
    (found,) = compare_models(results, DEFAULT_TERMS).values()
    assert [one.name for one in found.comparisons] == [
        "s4d 2x252 prenorm, model.modes=16",
        "s4d 2x252 prenorm, model.modes=8",
    ]


def test_trainings_of_the_same_title_have_tables_of_their_own() -> None:
    both = [*runs(GRU, [100.0]), *runs(S4D, [120.0])]
    longer = [*runs(GRU, [90.0], context=128), *runs(S4D, [110.0], context=128)]
    titles = list(compare_models([*both, *longer], DEFAULT_TERMS))
    assert len(titles) == 2
    assert "train.context=64" in titles[0]
    assert "train.context=128" in titles[1]


def test_models_are_not_compared_without_the_rule_of_the_baseline() -> None:
    results = [*runs(GRU, [100.0]), *runs(S4D, [120.0])]
    assert compare_models(results, Terms("dsf")) == {}


def test_tables_and_the_page_name_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [*runs(GRU, [100.0, 102.0, 104.0]), *runs(S4D, [120.0, 122.4, 124.8])]
    text = markdown_runs.models(Found(results, []), DEFAULT_TERMS)
    assert "| model, rule |" in text
    assert "| s4d 2x252 prenorm | 0.001 | 3 | 122.4 | +20.0% (+20.0 to +20.0): worse |" in text
    assert "s4d 2x252 prenorm" in page.page(Found(results, []))
    records = tmp_path / "runs.jsonl"
    records.write_text("".join(map(to_line, results)))
    cli.main(["report", str(records), "-o", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    assert "difference to gru 2x256 prenorm under bptt" in " ".join(printed.split())
    assert "+20.0%" in printed
