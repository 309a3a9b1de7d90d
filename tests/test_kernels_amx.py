"""Products in AMX tiles: in an emulation of the instructions that checks their rules, and on a CPU with AMX."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels_head import SHAPES as HEAD_SHAPES
from test_kernels_head import arguments
from test_kernels_layer import CELLS, Case, widths
from test_kernels_slstm import RULES
from test_kernels_slstm import SHAPES as SLSTM_SHAPES
from test_kernels_slstm import Case as SlstmCase
from tolerances import largest_error
from torch import Tensor

from statefeed import native
from statefeed.cells import CELLS as TABLE
from statefeed.native import build, head
from statefeed.native.compile import VARIANTS, compile_library

HERE = Path(__file__).parent
MODEL = ["-march=x86-64-v4", "-mavx512bf16", "-D__AMX_BF16__", "-include", str(HERE / "amx_model.h")]
TORCH = Path(torch.__file__).parent

if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("g++"):
    pytest.skip("needs g++ on Linux for x86-64", allow_module_level=True)
runs_the_model = pytest.mark.skipif("avx512_bf16" not in build.cpu_flags(), reason="the model needs AVX512-BF16")


@runs_the_model
def test_products_of_odd_sizes_follow_the_rules_of_the_tiles(tmp_path: Path) -> None:
    program = tmp_path / "products"
    subprocess.run(["g++", "-std=c++20", "-O1", *MODEL, str(HERE / "amx_products.cc"), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    wrong, products, configured = (int(word) for word in found.stdout.split() if word.isdigit())
    assert wrong == configured == 0
    assert products > 10_000


@pytest.mark.skipif("amx_bf16" not in build.cpu_flags(), reason="this CPU has no tiles")
def test_products_of_odd_sizes_in_the_tiles_of_this_cpu(tmp_path: Path) -> None:
    program = tmp_path / "products"
    source = str(HERE / "amx_products.cc")
    subprocess.run(["g++", "-std=c++20", "-O3", "-march=native", source, "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.startswith("0 wrong")


def test_a_misuse_of_the_tiles_is_detected(tmp_path: Path) -> None:
    """The emulation detects the violation of every rule."""
    (tmp_path / "misuse.cc").write_text(
        """
        #include <cstdint>
        int main(int, char** given) {
          alignas(64) unsigned char shape[64] = {1};
          alignas(64) static float numbers[256];
          auto set = [&](int tile, int bytes, int rows) { shape[16 + 2 * tile] = bytes, shape[48 + tile] = rows; };
          for (int tile = 0; tile < 8; ++tile) set(tile, 64, 16);
          const char which = *given[1];
          if (which == 'p') shape[0] = 2;
          if (which == 'r') set(0, 64, 17);
          if (which == 'b') set(0, 68, 16);
          if (which == 'o') set(9, 64, 16);
          if (which == 'z') set(0, 0, 16);
          if (which == 'm') set(1, 64, 15);
          if (which == 'd') set(2, 64, 15);
          if (which == 'c') set(2, 60, 16);
          if (which != 'u') _tile_loadconfig(shape);
          if (which == 'a') _tile_release();
          _tile_zero(0);
          _tile_loadd(1, numbers, 64);
          _tile_loadd(2, numbers, 64);
          if (which == 's') _tile_dpbf16ps(0, 1, 1);
          _tile_dpbf16ps(0, 1, 2);
        }
        """
    )
    program = tmp_path / "misuse"
    flags = [flag for flag in MODEL if not flag.startswith("-m")]
    subprocess.run(["g++", "-std=c++20", *flags, str(tmp_path / "misuse.cc"), "-o", str(program)], check=True)
    expected = {
        "p": "the palette", "r": "more than 16 rows", "b": "or 64 bytes", "o": "beyond the eighth",
        "z": "no bytes in a row", "m": "not the rows of the left side", "d": "depth", "c": "columns of the right side",
        "u": "before the configuration", "a": "after its release", "s": "the same tile", "-": "",
    }  # fmt: skip
    for letter, words in expected.items():
        found = subprocess.run([str(program), letter], capture_output=True, text=True, check=False)
        assert (found.returncode == 0) == (not words), letter
        assert words in found.stderr


# Choice of the library ----------------------------------------------------------------------------------------------


def on_a_machine_with_tiles(monkeypatch: pytest.MonkeyPatch, permitted: bool) -> None:
    """Emulate a CPU with all instruction sets, on Linux with or without permission to use tiles."""
    flags, read = " ".join(sorted(frozenset().union(*(v.required for v in VARIANTS)))), Path.read_text

    def read_text(path: Path, *arguments: str) -> str:
        return f"flags\t\t: {flags}\n" if path == Path("/proc/cpuinfo") else read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(build, "tiles_permitted", lambda: permitted)


@pytest.mark.parametrize(("permitted", "best"), [(True, "x86-64-v4-amx"), (False, "x86-64-v4-bf16")])
def test_tiles_are_used_if_linux_permits_them(
    permitted: bool, best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant in VARIANTS:
        (tmp_path / f"{variant.name}.so").touch()
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    on_a_machine_with_tiles(monkeypatch, permitted)
    assert build.instruction_set() == best
    assert build.prebuilt_library() == tmp_path / f"{best}.so"
    assert ("-U__AMX_BF16__" in build.machine_flags()) == (not permitted)


def test_the_cache_key_depends_on_the_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for permitted in (True, False):
        with monkeypatch.context() as patch:
            on_a_machine_with_tiles(patch, permitted)
            keys.add(build.cache_key())
    assert len(keys) == 2


def test_linux_does_not_permit_tiles_that_the_cpu_lacks() -> None:
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has tiles")
    assert not build.tiles_permitted()


# Whole layers ---------------------------------------------------------------------------------------------------------

# A separate process, because a process can load only one library.
WITH_LIBRARY = """
import ctypes, sys, torch
from pathlib import Path
from statefeed.native import build
build.prebuilt_library = lambda: Path(sys.argv[1])
from test_kernels_amx import answers, native
torch.save(answers(), sys.argv[2])
assert native.described().startswith("the wheel's model")
loaded = ctypes.CDLL(sys.argv[1])
print(*(ctypes.c_int64.in_dll(loaded, name).value for name in ("amx_products", "amx_held")))
"""


def answers() -> dict[str, Tensor]:
    """Outputs and gradients of layers and heads of odd sizes in bfloat16, on one thread and on two."""
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for cell in CELLS:
            for B, I, H in [
                (1, 1, 1),
                (2, 33, 7),
                (15, 3, 31),
                (16, 32, 32),
                (17, 17, 65),
                (33, 70, 40),
                (40, 64, 127),
            ]:
                if H == 1 and TABLE[cell].projects:
                    continue  # a projection has fewer units than the layer
                case = Case(cell, 5, B, I, H, torch.float32)
                fixed = torch.linspace(0, 0.9, sum(widths(cell, H)))
                for rule, corrections in (("exact", 0), (fixed, 0), ("direct", 1), ("jacobian", 2)):
                    name = rule if isinstance(rule, str) else "fixed"
                    for key, value in case.run(rule, corrections, bf16=True).items():
                        found[f"{cell} {B}x{I}x{H} {name}+{corrections}, {threads} threads: {key}"] = value
            found |= {f"{cell} packed, {threads} threads: {key}": v for key, v in packed(cell).items()}
        for shape in SLSTM_SHAPES:
            case = SlstmCase("slstm", *shape, dtype=torch.float32)
            for rule in RULES:
                name = f"slstm {shape} {rule}, {threads} threads"
                found |= {f"{name}: {key}": value for key, value in case.run(rule, bf16=True).items()}
        for shape in HEAD_SHAPES:
            losses, grads = head.losses_and_gradients(*arguments(*shape), bf16=True)
            for key, value in {"losses": losses, **grads._asdict()}.items():
                found[f"head {shape}, {threads} threads: {key}"] = value.clone()
    return found


def packed(cell: str) -> dict[str, Tensor]:
    """Results for sequences of many lengths, in several chunks."""
    lengths = [60, 60, *range(45, 5, -1), 1, 1]
    return Case(cell, 60, len(lengths), 5, 35, torch.float32).run_packed(lengths, "direct", 1, bf16=True)


def objects(library: Path) -> set[str]:
    """The tile instructions in a library."""
    listing = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return {word for word in ("ldtilecfg", "tdpbf16ps", "tilerelease") if word in listing}


@pytest.mark.slow
@runs_the_model
@pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")
def test_layers_in_tiles_equal_layers_without(tmp_path: Path) -> None:
    """Compare with this CPU's products of bfloat16 pairs; states may be rounded differently."""
    library = tmp_path / "model.so"
    compile_library(library, TORCH, MODEL)
    threads = torch.get_num_threads()
    command = [sys.executable, "-c", WITH_LIBRARY, str(library), str(tmp_path / "answers.pt")]
    found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    products, configured = map(int, found.stdout.split())
    assert products > 100_000
    assert configured == 0
    expected = answers()
    torch.set_num_threads(threads)
    worst, name = largest_error(torch.load(tmp_path / "answers.pt"), expected)
    assert worst < 5e-3, f"{name}: {worst:.1e}"


@pytest.mark.slow
def test_one_variant_holds_tile_instructions(tmp_path: Path) -> None:
    for variant in VARIANTS:
        if variant.machine == "x86_64":
            library = tmp_path / f"{variant.name}.so"
            compile_library(library, TORCH, list(variant.flags))
            expected = {"ldtilecfg", "tdpbf16ps", "tilerelease"} if "amx_bf16" in variant.required else set()
            assert objects(library) == expected, variant.name
