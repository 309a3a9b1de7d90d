"""Text and a trained run for the tests of the language-model application."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# cuBLAS reads it when CUDA starts; without it deterministic mode refuses every product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Triton decides at its own import whether it compiles or interprets: without a GPU, its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts a command in the background has it ignore Ctrl-C, and so would every process that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["compile_triton.py"]  # a script that a test runs

ROOT = Path(__file__).parent.parent  # of the repository

# Words in a fixed pseudo-random order: enough structure to learn, several hundred contexts long.
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "dog", "who", "ran", "to", "my", "old", "house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture
def ieee_float32() -> Iterator[None]:
    """Float32 products on a GPU are computed in float32, where torch as shipped lets cuDNN use TF32."""
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
    place, lines = 7, []
    for line in range(count):
        words = []
        for _ in range(5 + line % 5):
            place = (place * 1103 + 12345) % 65536
            words.append(WORDS[place // 256 % len(WORDS)])
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
    """A run folder that `statefeed train` left."""
    from statefeed.lm import cli

    folder = tmp_path_factory.mktemp("runs") / "char"
    assert cli.main(["train", *flags, f"--run.dir={folder}"]) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run without what differs from machine to machine: times and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    differs = ("seconds", "tokens_per_s", "peak_bytes")
    return [{k: v for k, v in row.items() if k not in differs and not k.endswith("_ms")} for row in rows]
