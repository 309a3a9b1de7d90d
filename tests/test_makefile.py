"""The Makefile: a Python that cannot be used is named, and leaves no broken environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")

OLD = f"""#!/bin/sh
exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 1, 'final', 0); exec(sys.argv[1])" "$2"
"""
WITHOUT_PIP = """#!/bin/sh
if [ "$1" = -m ]; then mkdir -p .venv/bin; touch .venv/bin/python; exit 1; fi
"""


def make(folder: Path, python: str) -> str:
    """What `make train` prints on stderr with a Python that is a shell script; it must fail."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    (folder / "python").write_text(python)
    (folder / "python").chmod(0o755)
    words = ["make", "train", f"PYTHON={folder / 'python'}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert not (folder / ".venv").exists()
    return done.stderr


def test_an_old_python_is_named(tmp_path: Path) -> None:
    first = make(tmp_path, OLD).splitlines()[0]
    assert first.startswith(
        "statefeed needs Python 3.10 or later, found 3.9: name another one, as in make train PYTHON="
    )


def test_an_environment_that_cannot_be_made_is_removed(tmp_path: Path) -> None:
    make(tmp_path, WITHOUT_PIP)
