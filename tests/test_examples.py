"""Every example runs as a reader would run it, and its result beats a stated threshold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
UNCOMPILED = "statefeed uses plain torch operations"  # the warning on a machine without a compiler


# The last lines: time and score of both.
SCORES = r"\nstatefeed +[\d.]+ s  {0} (\S+)\n(?:epoch .*\n|step .*\n)*torch\.nn +[\d.]+ s  {0} (\S+)\n"
FORECAST = SCORES.format("mean squared error") + r"repeating the last day:  mean squared error (\S+)\n$"


def run(name, *arguments):
    """What an example prints; warnings are errors. One thread: beside other tests, two would wait for each other."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", f"ignore:{UNCOMPILED}", str(EXAMPLES / name), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    match = re.search(pattern, text)
    assert match, text
    return [float(number) for number in match.groups()]


def test_one_line_swap_of_a_tagger():
    ours, theirs = numbers(SCORES.format("accuracy"), run("swap_tagger.py"))
    assert ours > 0.95
    assert theirs > 0.9


def test_forecast_of_a_made_csv():
    ours, theirs, repeated = numbers(FORECAST, run("forecast_csv.py"))
    assert max(ours, theirs) < 0.5 * repeated


def test_forecast_of_a_user_csv(tmp_path):
    rows = [f"2024-01-01 {hour % 24:02d}:00:00,{hour % 24},{(hour * 5) % 24 / 24}" for hour in range(1200)]
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(["date,hour,OT", *rows]) + "\n")
    ours, theirs, repeated = numbers(FORECAST, run("forecast_csv.py", file))
    assert repeated == 0
    assert max(ours, theirs) < 0.4


def test_sequential_digits():
    pytest.importorskip("sklearn", reason="the extra statefeed[examples] is not installed")
    ours, theirs = numbers(SCORES.format("accuracy"), run("sequential_digits.py"))
    assert ours > 0.8
    assert theirs > 0.5


def test_credit_by_lag(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra statefeed[examples] is not installed")
    figure = tmp_path / "lags.png"
    printed = run("credit_by_lag.py", figure)
    cosine = {rule: float(value) for rule, value in re.findall(r"^(\S+) +mean cosine .*: (\S+)$", printed, re.M)}
    assert cosine["ft-bptt"] == 0
    assert cosine["jacobian+3"] > 0.95
    assert cosine["gate+1"] > cosine["gate"] > 0.3
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_every_example_is_tested_and_has_a_descriptive_first_line():
    tested = Path(__file__).read_text()
    files = sorted(EXAMPLES.glob("*.py"))
    assert files
    for file in files:
        assert f'"{file.name}"' in tested
        first = file.read_text().partition("\n")[0]
        assert first.startswith('"""')
        assert len(first) > 30
