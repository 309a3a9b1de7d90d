"""Documentation: every Python block runs, every path and name in it exists, and it builds."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tables
import torch

import statefeed

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\S*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Python blocks run, Sphinx directives are built, and all other blocks are console.
KNOWN = {"python", "console", "{toctree}", "{eval-rst}", "{include}"}

page = pytest.mark.parametrize("name", TEXTS)


def run_blocks(name):
    """Run the Python blocks of a page one after the other, and return what they define."""
    namespace = {"__name__": f"docs.{name}"}
    for block in FENCE.finditer(TEXTS[name]):
        if block[1] == "python":
            line = TEXTS[name].count("\n", 0, block.start(2))
            exec(compile("\n" * line + block[2], f"{name}.md", "exec"), namespace)
    return namespace


@page
def test_every_python_block_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with tables.restored(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*the CPU kernels cannot be used")  # a machine without a compiler
        run_blocks(name)


def test_the_tables_on_scaling_are_what_its_blocks_print(capsys):
    namespace = {}
    for block in FENCE.finditer(TEXTS["scaling"]):
        if block[1] == "python":
            exec(block[2], namespace)
    printed = capsys.readouterr().out.splitlines()
    predicted = TEXTS["scaling"].partition("## What the measurement said")[0]
    rows = [line for line in predicted.splitlines() if re.match(r"\| (gru|lstm|bptt|\d)", line)]
    assert rows == printed


@page
def test_every_block_has_a_language(name):
    assert {block[1] for block in FENCE.finditer(TEXTS[name])} <= KNOWN


# Paths and names -----------------------------------------------------------------------------------------------------


def names_in(file):
    """Everything defined in a Python file, methods and nested classes by their dotted names."""

    def walk(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(walk(ast.parse(file.read_text(encoding="utf-8")).body, ""))


def missing(reference):
    """Why `path`, `path.py:name` or `path.py::test` cannot be found; None if it can."""
    path, _, name = re.sub("::", ":", reference).partition(":")
    file = ROOT / path
    if not file.exists():
        return f"{path} does not exist"
    if name and name not in names_in(file):
        return f"{path} defines no {name}"
    return None


REFERENCE = re.compile(r"`((?:statefeed|tests|recipes|examples|docs)/[\w/.*-]*(?:::?[\w.]+)?)`")
LINK = re.compile(r"\[`([^`]+)`\]\((\.\./[^)]+)\)")


@page
def test_every_path_and_name_exists(name):
    assert not [why for found in REFERENCE.findall(TEXTS[name]) if (why := missing(found))]


@page
def test_the_target_of_a_link_is_its_text(name):
    for text, target in LINK.findall(TEXTS[name]):
        assert target == f"../{text.partition(':')[0]}"


@page
def test_targets_of_links_between_pages_exist(name):
    for target in re.findall(r"\]\((\w[\w-]*\.md)[^)]*\)", TEXTS[name]):
        assert (DOCS / target).exists()


@pytest.mark.parametrize(
    "reference", ["statefeed/nowhere.py", "statefeed/cells.py:nobody", "tests/test_scan.py::test_x"]
)
def test_a_missing_reference_is_found(reference):
    assert REFERENCE.findall(f"`{reference}`") == [reference]
    assert missing(reference)


SECTIONS = re.split(r"^## ", TEXTS["mathematics"], flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_every_equation_has_its_code_and_its_test(section):
    linked = [text for text, _ in LINK.findall(section)]
    assert any(text.startswith("statefeed/") and ":" in text for text in linked)
    assert any(text.startswith("tests/") and "::test_" in text for text in linked)


def test_the_reference_lists_the_public_api():
    index = set(re.findall(r"\[`sf\.(\w+)`\]\(api/", TEXTS["api"]))
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
    listed = [re.findall(r"^\.\. auto\w+:: statefeed\.(\w+)$", text, re.MULTILINE) for text in pages]
    assert index == {name for (name,) in listed} == set(statefeed.__all__)


# Built ---------------------------------------------------------------------------------------------------------------


def test_it_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason='the documentation is built with pip install "statefeed[docs]"')
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), str(DOCS)]
    built = subprocess.run([*command, str(tmp_path / "html")], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    reference = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "html" / "api").glob("*.html"))
    assert all(f'id="statefeed.{name}"' in reference for name in statefeed.__all__)
    assert all(f"{name}</span>" in reference for name in ("hx", "device"))  # with their types
    assert all(f">{section}<" in reference for section in ("Gradient", "Cost"))
    assert "<math" in (tmp_path / "html" / "mathematics.html").read_text(encoding="utf-8")
    for built_page in (tmp_path / "html").rglob("*.html"):  # readable without a network
        assert not re.search(r'<(?:script|link)[^>]+(?:src|href)="(?:https?:)?//', built_page.read_text("utf-8"))
