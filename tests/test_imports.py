"""The house from outside: imports go down only, the front door opens without noise, every file says its duty."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import statefeed

HOUSE = Path(statefeed.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))

# A room may import the rooms below its own floor. The front door is __init__; a new room needs its floor here.
FLOORS = [
    {"native"},
    {"cells", "scan", "feedback", "pieces"},
    {"backends"},
    {"recurrence"},
    {"modules", "custom"},
    {"alignment", "explain", "swap", "schedule"},
    {"front door"},
    {"lm"},
    {"bench"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The applications stand on what everyone may use, the trainer's head on a kernel of its own; the benchmarks time both.
ALLOWED = {"lm": {"front door", "native"}, "bench": {"front door", "lm"}}


def room_of(file):
    first = file.relative_to(HOUSE).parts[0].removesuffix(".py")
    return "front door" if first == "__init__" else first


def is_room(name):
    return (HOUSE / f"{name}.py").exists() or (HOUSE / name).is_dir()


def rooms_imported(file, source):
    """The rooms of the house that a file imports anywhere in it, under TYPE_CHECKING or within a function as well."""
    package = ("statefeed", *file.relative_to(HOUSE).parent.parts)
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
                yield parts[1] if len(parts) > 1 and is_room(parts[1]) else "front door"


def steps_up(file, source):
    """The rooms that a file imports and must not."""
    room = room_of(file)
    below = {other for other in FLOOR if FLOOR[other] < FLOOR[room]}
    return set(rooms_imported(file, source)) - {room} - ALLOWED.get(room, below)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(HOUSE).as_posix())
def test_imports_go_down_only(file):
    assert room_of(file) in FLOOR, f"{room_of(file)} has no floor yet"
    assert not steps_up(file, file.read_text())


@pytest.mark.parametrize(
    ("file", "line", "refused"),
    [
        ("scan/prefix.py", "from statefeed.scan import fft", set()),
        ("scan/prefix.py", "from . import fft", set()),
        ("scan/prefix.py", "from statefeed import cells", {"cells"}),
        ("scan/prefix.py", "from ..recurrence import recurrence", {"recurrence"}),
        ("recurrence.py", "from statefeed.scan import diagonal_scan", set()),
        ("recurrence.py", "import statefeed as sf", {"front door"}),
        ("cells.py", "def f():\n    import statefeed.modules", {"modules"}),
        ("swap.py", "from .modules import GRU", set()),
        ("swap.py", "from statefeed.alignment import alignment", {"alignment"}),
        ("lm/model.py", "import statefeed as sf", set()),
        ("lm/model.py", "from statefeed import GRU", set()),
        ("lm/model.py", "from statefeed.modules import GRU", {"modules"}),
        ("lm/model.py", "from .. import bench", {"bench"}),
        ("bench/training.py", "from statefeed.lm import config", set()),
        ("bench/training.py", "from statefeed.modules import GRU", {"modules"}),
        ("__init__.py", "from statefeed.lm import train", {"lm"}),
        ("__main__.py", "from statefeed.lm import cli", set()),
    ],
)
def test_the_rule_itself_tells_up_from_down(file, line, refused):
    if not (HOUSE / "bench").is_dir() and "bench" in line:
        return
    assert steps_up(HOUSE / file, line) == refused


PROBE = """
import sys, torch
before, state, threads = set(sys.modules), torch.get_rng_state(), torch.get_num_threads()
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[0]) if args else "")))
import statefeed
events = list(seen)
new = sorted(set(sys.modules) - before)
allowed = set(sys.stdlib_module_names) | {"torch", "statefeed"}
assert not [name for name in new if name.split(".")[0] not in allowed], new
assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "statefeed.lm"))], new
started = [e for e in events if e[0] in ("subprocess.Popen", "os.system", "os.posix_spawn", "ctypes.dlopen")]
assert not started, started
read = [p for e, p in events if e == "open" and HOUSE in p and not p.endswith((".py", ".pyc"))]
assert not [p for p in read if "__pycache__" not in p], read
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
assert torch.get_default_dtype() == torch.float32
"""


def test_import_is_lean(tmp_path):
    """It reads nothing but its own source, starts nothing, prints nothing, leaves nothing, changes nothing."""
    before = {file for file in HOUSE.rglob("*") if "__pycache__" not in file.parts}
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", f"HOUSE = {str(HOUSE)!r}\n{PROBE}"],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(HOUSE.parent),
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
    assert {file for file in HOUSE.rglob("*") if "__pycache__" not in file.parts} == before


@pytest.mark.parametrize("name", statefeed.__all__)
def test_everything_at_the_front_door_is_there_and_documented(name):
    assert inspect.getdoc(getattr(statefeed, name))


def test_the_front_door_is_in_order():
    assert len(set(statefeed.__all__)) == len(statefeed.__all__)
    public = {name for name, value in vars(statefeed).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public - {"annotations"} == set(statefeed.__all__)


SOURCES = sorted(f for f in HOUSE.rglob("*") if f.suffix in (".py", ".cc", ".cpp", ".h", ".cu"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(HOUSE).as_posix())
def test_every_file_says_its_duty_in_its_first_line(file):
    first = file.read_text().partition("\n")[0]
    mark = '"""' if file.suffix == ".py" else "//"
    assert first.startswith(mark)
    assert len(first.strip('"/ ')) > 20


def test_no_room_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "base", "helpers", "helper", "misc"}
    assert not [file for file in HOUSE.rglob("*") if file.stem in drawers]
