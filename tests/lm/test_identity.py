"""Run identity: every key says whether it defines the task, varies between compared runs, or is the place of a run."""

import dataclasses
from typing import Any

import pytest

from statefeed.lm import identity
from statefeed.lm.compare.results import Result
from statefeed.lm.compare.tasks import tasks
from statefeed.lm.config import SECTIONS, Config, Model, Run, Train

PLACES = {
    *("train.device", "train.parallel", "train.compile"),
    *("run.dir", "run.checkpoint_minutes", "run.checkpoints", "run.tensorboard"),
}
VARIED = {"model.feedback", "model.forward", "train.lr", "train.seed", "train.alignment"}
EVERY = {f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in dataclasses.fields(kind)}


def result(config: Config, **metadata: Any) -> Result:
    rows = [{"step": 1, "epochs": 1.0, "seconds": 1.0, "perplexity": 2.0}]
    known = {"corpus": "text", "parameters": 7, **metadata}
    return Result(dataclasses.asdict(config), known, "finished", rows, [], {}, None, None, None)


def test_every_key_has_one_flag() -> None:
    assert set(identity.keys("place")) == PLACES
    assert set(identity.keys("run")) == VARIED
    assert set(identity.keys("task")) == EVERY - PLACES - VARIED


def test_a_place_changes_neither_the_run_nor_the_task() -> None:
    here = Config()
    there = Config(
        train=Train(device="cpu", parallel="fsdp", compile="default"), run=Run(dir="elsewhere", checkpoints=9)
    )
    assert identity.difference(dataclasses.asdict(here), dataclasses.asdict(there)) is None
    assert len(tasks([result(here), result(there)])) == 1


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (Config(model=Model(feedback="gate")), "model.feedback"),
        (Config(train=Train(lr=1.0)), "train.lr"),
        (Config(train=Train(seed=2)), "train.seed"),
        (Config(train=Train(alignment=True)), "train.alignment"),
    ],
)
def test_a_varied_key_is_another_run_of_the_same_task(other: Config, key: str) -> None:
    found = identity.difference(dataclasses.asdict(Config()), dataclasses.asdict(other))
    assert found is not None
    assert found[0] == key
    assert len(tasks([result(Config()), result(other)])) == 1


def test_anything_else_is_another_task() -> None:
    other = Config(train=Train(batch=7))
    assert identity.difference(dataclasses.asdict(Config()), dataclasses.asdict(other)) == ("train.batch", 32, 7)
    assert len(tasks([result(Config()), result(other)])) == 2
    assert len(tasks([result(Config()), result(Config(), device="a GPU")])) == 2  # whose times are not comparable


def test_a_rule_is_one_however_it_is_spelled() -> None:
    spellings = [
        dataclasses.asdict(Config(model=Model(feedback=rule))) for rule in (0.0, "0.0", "ft-bptt", "ft-bptt+0")
    ]
    for recipe in spellings[1:]:
        assert identity.difference(spellings[0], recipe) is None
    assert {identity.select(recipe, "run")["model.feedback"] for recipe in spellings} == {"ft-bptt"}
    wrong = dataclasses.asdict(Config(model=Model(feedback="nothing")))
    assert identity.difference(spellings[0], wrong) == ("model.feedback", 0.0, "nothing")
