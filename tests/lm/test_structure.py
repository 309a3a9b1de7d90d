"""The folders of the application: imports go down only, and files stay short."""

import ast
from pathlib import Path

import pytest

import statefeed.lm

PACKAGE = Path(statefeed.lm.__file__).parent
# What a file may import: the folders before its own, and the files at the top that every folder uses.
FOLDERS = ["data", "model", "run", "compare", "commands", "cli"]
TOP = {"atomic_file", "config", "errors", "identity", "migration", "recipe", "shipped", "yaml_file"}
# The names by which they still import these modules.
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path, source: str) -> set[str]:
    """The parts of the application that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("statefeed.lm"):
            parts = node.module.split(".")[2:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found


def above(path: Path, source: str) -> set[str]:
    """What a file imports and must not."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = set(TOP) if own in TOP else TOP | set(FOLDERS[: FOLDERS.index(own) + 1]) if own in FOLDERS else set()
    return imported(path, source) - allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down_and_files_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not above(path, source)
    assert len(source.splitlines()) <= 305


@pytest.mark.parametrize(
    ("path", "line", "refused"),
    [
        ("data/tokens.py", "from statefeed.lm.run.log import Log", {"run"}),
        ("model/head.py", "from statefeed.lm.data import batches", set()),
        ("run/train.py", "from statefeed.lm.compare import page", {"compare"}),
        ("config.py", "from statefeed.lm.data import corpora", {"data"}),
        ("config.py", "from statefeed.lm.errors import UsageError", set()),
        ("cli.py", "from statefeed.lm.compare import page", set()),
    ],
)
def test_the_check_rejects_imports_that_go_up(path: str, line: str, refused: set[str]) -> None:
    assert above(PACKAGE / path, line) == refused
