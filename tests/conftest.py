"""Shared fixtures: a text, a trained run, and the settings of GPU tests."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# cuBLAS reads it when CUDA starts; without it, products on a GPU raise in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Triton chooses between compiler and interpreter when it is imported: without a GPU the interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell makes background commands ignore Ctrl-C, which the processes started by tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["compile_triton.py"]  # a script that a test runs

ROOT = Path(__file__).parent.parent

# Words in a fixed pseudo-random order: enough structure to learn, several hundred contexts long.
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "dog", "who", "ran", "to", "my", "old", "house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none, and tests that compile layers if torch is too old for it."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
        if item.get_closest_marker("compiles") and torch.__version__ < "2.13":
            item.add_marker(pytest.mark.skip(reason="torch.compile of a recurrent layer needs torch 2.13"))


@pytest.fixture
def ieee_float32() -> Iterator[None]:
    """Compute float32 products on a GPU in float32; by default torch lets cuDNN use TF32."""
    from statefeed.bench.precision import tf32

    with tf32(False):
        yield


@pytest.fixture(autouse=True)
def _ieee_float32_on_a_gpu(request: pytest.FixtureRequest) -> None:
    """Tests marked gpu compare with float32 or better."""
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("ieee_float32")


def sentences(count: int) -> str:
    """`count` lines of five to nine words each."""
    state, lines = 7, []
    for line in range(count):
        words = []
        for _ in range(5 + line % 5):
            state = (state * 1103 + 12345) % 65536
            words.append(WORDS[state // 256 % len(WORDS)])
        lines.append(" ".join(words) + "\n")
    return "".join(lines)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text file of 400 lines."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(sentences(400), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def flags(text: Path) -> list[str]:
    """Flags of a run that takes about a second."""
    return [
        "--data.corpus=text",
        f"--data.path={text}",
        "--data.tokens=char",
        "--model.width=16",
        "--train.batch=4",
        "--train.context=16",
        "--train.steps=12",
        "--train.warmup=2",
        "--train.evaluations=3",
    ]


@pytest.fixture(scope="session")
def run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a `statefeed train` run."""
    from statefeed.lm import cli

    folder = tmp_path_factory.mktemp("runs") / "char"
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics rows of a run without times and memory, which differ between machines."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    differs = ("seconds", "tokens_per_s", "peak_bytes")
    return [{k: v for k, v in row.items() if k not in differs and not k.endswith("_ms")} for row in rows]
