"""`statefeed recipes`: what it lists and copies, and that a wheel has the recipes."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from statefeed.lm import cli, shipped
from statefeed.lm import recipe as recipes

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.yaml")}


def test_every_recipe_is_listed_with_what_it_is(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert cli.main(["recipes"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert [name for name, _ in lines] == NAMES
    assert all(re.match(r"[A-Z`].{30,}$", title) for _, title in lines)
    assert not list(here.iterdir())


def test_copies_are_recipes_with_their_bases(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert cli.main(["recipes", "ptb-gru-1x256.yaml", "quickstart"]) == 0
    assert set(files(here / "recipes")) == {"ptb-gru-1x256.yaml", "quickstart.yaml", "base/ptb.yaml"}
    assert capsys.readouterr().out.endswith("next: statefeed train recipes/ptb-gru-1x256.yaml\n")
    assert recipes.load(here / "recipes" / "ptb-gru-1x256.yaml") == recipes.load(ROOT / "recipes/ptb-gru-1x256.yaml")
    assert cli.main(["recipes", "all", "--out=mine"]) == 0
    assert files(here / "mine") == files(ROOT / "recipes")


def test_another_file_is_never_replaced(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert cli.main(["recipes", "quickstart"]) == 0
    assert cli.main(["recipes", "quickstart"]) == 0  # the same again
    changed = here / "recipes" / "quickstart.yaml"
    changed.write_text("train: {steps: 3}\n")
    capsys.readouterr()
    assert cli.main(["recipes", "all"]) == 2
    assert "recipes/quickstart.yaml exists and is not the recipe: name another folder" in capsys.readouterr().err
    assert files(here / "recipes") == {"quickstart.yaml": "train: {steps: 3}\n"}


def test_the_recipe_that_was_meant(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert cli.main(["recipes", "quikstart"]) == 2
    assert capsys.readouterr().err == "statefeed: there is no recipe quikstart: did you mean quickstart?\n"
    assert cli.main(["recipes", "xyz", "all"]) == 2
    assert cli.main(["recipes", "xyz"]) == 2
    assert "there is no recipe xyz: `statefeed recipes` lists them" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_recipes_inside_the_package_are_those_of_a_wheel(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "PACKAGE", here / "statefeed")
    assert cli.main(["recipes"]) == 2
    assert "the recipes are missing: expected them in " in capsys.readouterr().err
    (here / "statefeed" / "recipes").mkdir(parents=True)
    (here / "statefeed" / "recipes" / "quickstart.yaml").write_text("# One.\n")
    assert shipped.titles() == {"quickstart": "One."}


def test_a_wheel_has_the_recipes(here: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    zipfile = pytest.importorskip("zipfile")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(here), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        inside = {name for name in archive.namelist() if name.startswith("statefeed/recipes/")}
    assert inside == {f"statefeed/recipes/{name}" for name in files(ROOT / "recipes")}
