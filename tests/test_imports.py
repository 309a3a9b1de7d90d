"""Structure of the package: imports go down only, importing has no side effects, every file says what it contains."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import statefeed

PACKAGE = Path(statefeed.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module or folder may import those of the levels above it in this list; a new one needs its level here.
LEVELS = [
    {"user_warning", "model_argument", "agreement", "saved_tensors", "joined_class", "revert"},
    {"native", "busy"},
    {"layout", "scan"},
    {"cells"},
    {"feedback"},
    {"backends"},
    {"transforms", "newton"},
    {"recurrence"},
    {"mixin", "paths", "torch_functions"},
    {"stack"},
    {"layers", "cell_layer", "custom"},
    {"slstm", "conversions"},
    {"modules", "snapshot", "timing", "counts"},
    {"lags"},
    {"subclass"},
    {"alignment", "explain", "swap", "schedule"},
    {"public API"},
    {"lm", "integrations"},
    {"bench"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# The applications use the public API; the trainer's head also uses a kernel, and the benchmarks use the trainer
# and report the load of the machine.
ALLOWED = {"lm": {"public API", "native"}, "integrations": {"public API"}, "bench": {"public API", "lm", "busy"}}


def top_level_of(file):
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "public API" if first == "__init__" else first


def is_top_level(name):
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


def imported(file, source):
    """All imports of the package in a file, including those under TYPE_CHECKING and in functions."""
    package = ("statefeed", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            modules = [f"{module}.{alias.name}" if module == "statefeed" else module for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "statefeed":
                yield parts[1] if len(parts) > 1 and is_top_level(parts[1]) else "public API"


def upward_imports(file, source):
    """Imports of a file that its level does not allow."""
    name = top_level_of(file)
    below = {other for other in LEVEL if LEVEL[other] < LEVEL[name]}
    return set(imported(file, source)) - {name} - ALLOWED.get(name, below)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(file):
    assert top_level_of(file) in LEVEL, f"{top_level_of(file)} has no level yet"
    assert not upward_imports(file, file.read_text())


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("scan/prefix.py", "from statefeed.scan import fft", set()),
        ("scan/prefix.py", "from . import fft", set()),
        ("scan/prefix.py", "from statefeed import cells", {"cells"}),
        ("scan/prefix.py", "from ..recurrence import recurrence", {"recurrence"}),
        ("recurrence.py", "from statefeed.scan import diagonal_scan", set()),
        ("recurrence.py", "import statefeed as sf", {"public API"}),
        ("cells/gru.py", "def f():\n    import statefeed.layers", {"layers"}),
        ("swap.py", "from .layers import GRU", set()),
        ("swap.py", "from statefeed.alignment import alignment", {"alignment"}),
        ("lm/cli.py", "import statefeed as sf", set()),
        ("lm/cli.py", "from statefeed import GRU", set()),
        ("lm/cli.py", "from statefeed.layers import GRU", {"layers"}),
        ("lm/cli.py", "from .. import bench", {"bench"}),
        ("integrations/lightning.py", "import statefeed as sf", set()),
        ("integrations/lightning.py", "from statefeed.swap import swap", {"swap"}),
        ("bench/training.py", "from statefeed.lm import config", set()),
        ("bench/training.py", "from statefeed.layers import GRU", {"layers"}),
        ("__init__.py", "from statefeed.lm import train", {"lm"}),
        ("__main__.py", "from statefeed.lm import cli", set()),
    ],
)
def test_the_check_finds_upward_imports(file, line, expected):
    assert upward_imports(PACKAGE / file, line) == expected


PROBE = """
import sys, torch
before, state, threads = set(sys.modules), torch.get_rng_state(), torch.get_num_threads()
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[0]) if args else "")))
import statefeed
statefeed.GRU
events = list(seen)
new = sorted(set(sys.modules) - before)
allowed = set(sys.stdlib_module_names) | {"torch", "statefeed"}
assert not [name for name in new if name.split(".")[0] not in allowed], new
assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "statefeed.lm"))], new
started = [e for e in events if e[0] in ("subprocess.Popen", "os.system", "os.posix_spawn", "ctypes.dlopen")]
assert not started, started
read = [p for e, p in events if e == "open" and PACKAGE in p and not p.endswith((".py", ".pyc"))]
assert not [p for p in read if "__pycache__" not in p], read
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
assert torch.get_default_dtype() == torch.float32
"""


def test_import_is_lean(tmp_path):
    """Importing reads only the package's source; it starts, prints, writes and changes nothing."""
    before = {file for file in PACKAGE.rglob("*") if "__pycache__" not in file.parts}
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", f"PACKAGE = {str(PACKAGE)!r}\n{PROBE}"],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(PACKAGE.parent),
            "HOME": str(tmp_path),
            "XDG_CACHE_HOME": str(tmp_path),
            "TORCH_EXTENSIONS_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
    assert {file for file in PACKAGE.rglob("*") if "__pycache__" not in file.parts} == before


@pytest.mark.parametrize("name", statefeed.__all__)
def test_every_public_name_is_documented(name):
    assert inspect.getdoc(getattr(statefeed, name))


def test_all_lists_every_public_name():
    assert len(set(statefeed.__all__)) == len(statefeed.__all__)
    public = {name for name, value in vars(statefeed).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public - {"annotations"} == set(statefeed.__all__)


SOURCES = sorted(f for f in PACKAGE.rglob("*") if f.suffix in (".py", ".cc", ".cpp", ".h", ".cu"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_the_first_line_of_every_file_says_what_it_contains(file):
    first = file.read_text().partition("\n")[0]
    mark = '"""' if file.suffix == ".py" else "//"
    assert first.startswith(mark)
    assert len(first.strip('"/ ')) > 20


def test_no_module_is_called_utils():
    names = {"utils", "util", "common", "base", "helpers", "helper", "misc"}
    assert not [file for file in PACKAGE.rglob("*") if file.stem in names]


def private_uses(source):
    """Names with a leading underscore that a file takes from another module of the package."""
    tree = ast.parse(source)
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "statefeed":
            modules |= {alias.asname or alias.name for alias in node.names}
            yield from (alias.name for alias in node.names if re.match("_(?!_)", alias.name))
        elif isinstance(node, ast.Import):
            modules |= {alias.asname for alias in node.names if alias.asname and alias.name.startswith("statefeed")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if re.match("_(?!_)", node.attr):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr" and len(node.args) > 1:
            owner, name = node.args[:2]
            if isinstance(owner, ast.Name) and owner.id in modules and isinstance(name, ast.Constant):
                yield from [f"{owner.id}.{name.value}"] if re.match("_(?!_)", str(name.value)) else []


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=lambda file: "/".join(file.parts[-2:]))
def test_a_name_with_an_underscore_is_used_in_its_module_only(file):
    assert not list(private_uses(file.read_text("utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "from statefeed.native import build\nbuild._key()",
        "from statefeed.native.build import _key",
        "import statefeed.native as kernels\nkernels._load()",
        "from statefeed.native import build\nmonkeypatch.setattr(build, '_key', None)",
    ],
)
def test_a_planted_private_use_is_found(source):
    assert list(private_uses(source))


def test_a_module_under_a_private_alias_is_not_a_private_use():
    assert not list(private_uses("from statefeed.backends.triton import operators as _operators"))
