"""Building the kernels: time, place, locking and failures; each case is a separate process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from statefeed.native import compile

PROGRAM = """
import warnings
import torch
from statefeed import native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = native.available(), native.available()
assert first == second
print(first, len(caught), *(w.message for w in caught))
"""
LOADED = "import sys; import statefeed; import statefeed.native; print('statefeed.native.build' in sys.modules)"


def python(program: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(program: str, **environment: str) -> str:
    process = python(program, **environment)
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out.strip()


@pytest.fixture
def quick_compiler(tmp_path: Path) -> str:
    """A compiler that fails at once."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || echo >> {tmp_path}/calls\necho "error: no" >&2\n[ "$1" = --version ]\n'
    )
    compiler.chmod(0o755)
    return str(compiler)


def test_import_builds_nothing() -> None:
    assert output_of(LOADED) == "False"


def test_off_is_silent() -> None:
    assert output_of(PROGRAM, STATEFEED_KERNELS="off") == "False 0"


def test_an_invalid_setting_raises() -> None:
    process = python(PROGRAM, STATEFEED_KERNELS="yes")
    assert "must be on, off or auto, got 'yes'" in process.communicate()[1]


def test_without_a_compiler_there_is_one_warning(tmp_path: Path) -> None:
    answer = output_of(PROGRAM, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert answer.startswith("False 1 ")
    assert "no C++ compiler found" in answer


def test_a_missing_compiler_is_not_replaced_by_another(tmp_path: Path) -> None:
    answer = output_of(PROGRAM, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert answer.startswith("False 1 ")
    assert "CXX must name a program, got 'no-such-compiler'" in answer


def test_the_compiler_may_have_arguments(tmp_path: Path, quick_compiler: str) -> None:
    answer = output_of(PROGRAM, CXX=f"env {quick_compiler}", XDG_CACHE_HOME=str(tmp_path))
    assert "error: no" in answer  # what this compiler says, and not env


def test_on_raises_if_the_kernels_are_unavailable(tmp_path: Path) -> None:
    process = python(PROGRAM, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path), STATEFEED_KERNELS="on")
    assert "RuntimeError: STATEFEED_KERNELS is on, but" in process.communicate()[1]


def test_a_cache_that_cannot_be_written(tmp_path: Path, quick_compiler: str) -> None:
    (tmp_path / "cache").write_text("a file where a folder is needed")
    answer = output_of(PROGRAM, CXX=quick_compiler, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert answer.startswith("False 1 ")
    assert "cache" in answer


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, quick_compiler: str) -> None:
    answer = output_of(PROGRAM, CXX=quick_compiler, XDG_CACHE_HOME=str(tmp_path))
    assert answer.startswith("False 1 ")
    assert "error: no" in answer
    assert not list((tmp_path / "statefeed").glob("*.so"))


def test_an_invalid_compiler_is_named(tmp_path: Path) -> None:
    program = tmp_path / "c++"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    answer = output_of(PROGRAM, CXX=str(program), XDG_CACHE_HOME=str(tmp_path))
    assert answer.startswith("False 1 ")
    assert f"{program} --version failed with exit code 3: is CXX a compiler?" in answer


def test_two_processes_build_once(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    compiler = tmp_path / "counting"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = -shared ] && echo >> {calls}\nexec "${{REAL:-g++}}" "$@"\n')
    compiler.chmod(0o755)
    together = [python(PROGRAM, CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    answers = [process.communicate()[0].strip() for process in together]
    if answers[0] != "True 0":
        pytest.skip("there is no g++")
    assert answers == ["True 0", "True 0"]
    assert len(calls.read_text()) == 1
    assert output_of(PROGRAM, CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path)) == "True 0"
    assert len(calls.read_text()) == 1


def warnings_of(sources: list[Path]) -> str:
    """What g++ says to ``-Wall -Wextra`` about each source; nothing is compiled, so this takes seconds."""
    include = [f"-I{folder}" for folder in compile.SOURCE_FOLDERS]
    include.append(f"-isystem{Path(torch.__file__).parent / 'include'}")
    flags = [*compile.FLAGS, "-march=native", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *include]
    jobs = [subprocess.Popen(["g++", *flags, str(s)], stderr=subprocess.PIPE, text=True) for s in sources]
    return "".join(job.communicate()[1] for job in jobs)


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
def test_the_sources_compile_without_warnings(tmp_path: Path) -> None:
    (tmp_path / "planted.cc").write_text("int unused_parameter(int x) { return 0; }\n")
    assert "unused parameter" in warnings_of([tmp_path / "planted.cc"])
    assert warnings_of(compile.sources(".cc")) == ""
