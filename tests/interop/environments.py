"""One virtual environment per package: install with torch constrained, run its test file, print what came of it.

``python tests/interop/environments.py [--record MACHINE] [NAME ...]``, as ``make interop`` does; without names, every
file in packages/. A package that cannot be installed beside the torch of constraints.txt is skipped with pip's reason.

With ``--record`` every model is fitted seven times both ways, the records are appended to
results/packages/MACHINE.jsonl, and the table in docs/packages.md is written from all records there.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "interop"
_NOTHING_RAN = 5  # of pytest, where a file skips itself as it is imported
NAMES = sorted(file.stem for file in (HERE / "packages").glob("*.txt"))


def main(words: list[str]) -> int:
    flags = argparse.ArgumentParser(prog="environments.py")
    flags.add_argument("--record", metavar="MACHINE", help="name of the machine, as in results/bench")
    flags.add_argument("names", nargs="*", metavar="NAME")
    values = flags.parse_args(words)
    unknown = sorted(set(values.names) - set(NAMES))
    if unknown:
        print(f"no such package: {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    if values.record is None:
        records, turns = BUILD / "records.jsonl", 2
        records.write_text("")
    else:
        records, turns = table.RECORDS / f"{values.record}.jsonl", 7
        records.parent.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for name in values.names or NAMES:
        print(f"== {name}", flush=True)
        outcomes[name] = install(name) or run(name, records, turns)
    print()
    for name, outcome in outcomes.items():
        print(f"{name:<20} {outcome}")
    print(f"\nlosses and times of whole steps: {records}")
    if values.record is not None:
        table.write()
    return 1 if any(outcome.startswith("failed") for outcome in outcomes.values()) else 0


def install(name: str) -> str | None:
    """Why the environment could not be made; None if it is there."""
    environment, requirements = BUILD / name, HERE / "packages" / f"{name}.txt"
    done = environment / ".installed"
    if done.exists() and done.read_text() == requirements.read_text():
        return None
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    (torch,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    constraint = BUILD / "constraints.txt"
    constraint.write_text(torch + "\n")
    pip = [environment / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraint]
    try:
        finished = subprocess.run(
            [*pip, torch, "pytest", "numpy", "--requirement", requirements],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=900,
        )
    except subprocess.TimeoutExpired:
        return "skipped: pip took more than 15 minutes"
    if finished.returncode:
        errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        return f"skipped: {errors[0] if errors else finished.stderr.strip()}"
    done.write_text(requirements.read_text())
    return None


def run(name: str, records: Path, turns: int) -> str:
    """The outcome of the package's tests, test_NAME.py and test_NAME_*.py, in one line."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "STATEFEED_INTEROP_RECORDS": str(records),
        "STATEFEED_INTEROP_TURNS": str(turns),
    }
    command = [BUILD / name / "bin" / "python", "-m", "pytest", "-m", "interop", "--quiet", "--show-capture=no"]
    finished = subprocess.run(
        [*command, HERE / f"test_{name}.py", *sorted(HERE.glob(f"test_{name}_*.py"))],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = finished.stdout.strip().splitlines()
    last = lines[-1]
    if finished.returncode in (0, _NOTHING_RAN) and "passed" not in last:
        return next((line for line in lines if line.startswith("SKIPPED")), last)
    if finished.returncode:
        print(finished.stdout)
        return f"failed: {last}"
    return f"passed: {last}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
