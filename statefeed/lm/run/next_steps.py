"""What a finished run suggests: the commands to type next, and where its picture is."""

import shlex
import shutil
import sys
from pathlib import Path

from statefeed.lm.config import RECURRENT, Config
from statefeed.lm.run.files import CONFIG, CURVES


def program() -> str:
    """How this program is called: as it was, where that is not on the PATH.

    Example:
        >>> program()  # here the program is another one
        'statefeed'
    """
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == "statefeed":
        return f"{shlex.quote(sys.executable)} -m statefeed"
    if called.name == "statefeed" and shutil.which("statefeed") is None:
        return shlex.quote(str(called))
    return "statefeed"


def next_steps(config: Config, folder: Path, splits: list[str]) -> str:
    """Three commands and the path of the learning curves.

    Args:
        config: the recipe of the run.
        folder: of the run.
        splits: of its corpus.
    """
    name, run = program(), shlex.quote(str(folder))
    split = "test" if "test" in splits else "valid"
    lines = [f"{name} generate {run} --tokens=200", f"{name} evaluate {run} --split={split}"]
    if config.model.cell in RECURRENT:
        lines.append(f"{name} compare {shlex.quote(str(folder / CONFIG))} --feedback=bptt,dsf")
    else:
        lines.append(f"{name} report {run}")
    commands = "".join(f"  {line}\n" for line in lines)
    return f"learning curves: {folder / CURVES}\nnext:\n{commands}".rstrip("\n")
