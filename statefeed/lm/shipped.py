"""The recipes that come with the package: what there is, and copies of them."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from statefeed.lm.atomic_file import write_output
from statefeed.lm.errors import UsageError
from statefeed.lm.yaml_file import BASE, load_yaml

PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Where they are: inside the package in a wheel, beside it in a checkout.

    Raises:
        UsageError: when they are in neither.
    """
    for place in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if (place / "quickstart.yaml").is_file():
            return place
    raise UsageError(f"the recipes are missing: expected them in {PACKAGE / 'recipes'}, install statefeed again")


def titles() -> dict[str, str]:
    """The first line of every recipe, by name."""
    found = sorted(folder().glob("*.yaml"), key=lambda path: path.stem)
    return {path.stem: path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for path in found}


def hint(path: str | Path) -> str:
    """What to add to the message that a recipe is missing: how to copy it, if the package has one of that name."""
    name = Path(path).name.removesuffix(".yaml")
    try:
        near = difflib.get_close_matches(name, titles(), n=1)
    except UsageError:
        return ""
    if not near:
        return ""
    return f"; `statefeed recipes {name}` copies it" if name == near[0] else f": did you mean {near[0]}.yaml?"


def copy(names: Sequence[str], target: Path) -> list[Path]:
    """Copy recipes, and the files that they name as their base.

    Args:
        names: of recipes, with or without `.yaml`; `all` is every one.
        target: folder, made where it is missing.

    Returns:
        The files that were written.

    Raises:
        UsageError: for an unknown name, and where another file of that name exists; nothing is written then.
    """
    known, files = titles(), dict[str, None]()
    wanted = [name.removesuffix(".yaml") for name in names if name != "all"]
    for name in [*wanted, *(known if "all" in names else ())]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`statefeed recipes` lists them"
            raise UsageError(f"there is no recipe {name}: {hint}")
        files[f"{name}.yaml"] = None
        base = load_yaml((folder() / f"{name}.yaml").read_text(encoding="utf-8")).get(BASE)
        if base is not None:
            files[base] = None
    texts = {target / file: (folder() / file).read_text(encoding="utf-8") for file in files}
    for path, text in texts.items():
        if path.exists() and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            raise UsageError(f"{path} exists and is not the recipe: name another folder with --out")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, text)
    return list(texts)
