"""Words and identifiers that the project does not use, searched in its Python, C++, YAML and Markdown files."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".md", ".h", ".cc", ".yaml", "Makefile")
# This list, and files that name keys of records made by version 0.1.
EXEMPT = {"tests/test_language.py", "statefeed/lm/migration.py", "tests/lm/run/test_old_runs.py"}

# Prose, in any case; words of a phrase may be separated by a line break and a comment sign.
RETIRED_PHRASES = (
    "anew", "owns", "told", "lives", "front door", "put back", "puts back", "in even ratios", "goes on exactly",
    "tells what they gain", "what became of each claim", "refused in one sentence",
    "nothing of statefeed left", "least to largest", "numbers a row", "that is there already", "wilder",
    "mistake of the user's", "mistake of a user's", "hands back", "handed back",
    "goes on", "went on", "stands in the", "stand beside", "stands twice", "in disguise", "in force", "their like",
    "beforehand", "of today", "whole or not at all", "turn by turn", "in one go", "one line a", "one row a",
    "one record a", "one figure a", "one token a", "one object a", "as it lies", "as they lie", "taken for the other",
    "of one's own", "ones own", "by way of a", "lies in", "lie in", "left alone", "leave alone",
    "hand to", "hands to", "by themselves what", "is none of", "as often as not", "call themselves", "without end",
    "carries along", "for good", "wherever they", "younger than",
)  # fmt: skip
BRITISH = (
    r"optimis\w+", r"initialis\w+", r"normalis\w+", r"generalis\w+", r"speciali[s]\w+", r"quantis\w+", r"serialis\w+",
    r"parallelis\w+", r"vectoris\w+", r"linearis\w+", r"tokenis\w+", r"summaris\w+", r"synchronis\w+", r"randomis\w+",
    r"regularis\w+", r"minimis\w+", r"maximis\w+", r"recognis\w+", r"organis\w+", r"utilis\w+", r"realis\w+",
    r"materialis\w+", r"analys(?:e|ed|es|ing)", r"behaviour\w*", r"colour\w*", r"favour\w*", r"neighbour\w*",
    r"labelled", r"labelling", r"modelling", r"modelled", r"cancelled", r"travell\w+", "centre[sd]?", "grey",
    "licence[sd]?", "defence", "artefacts?", "judgement", "catalogue", "programme",
)  # fmt: skip

# Names of functions, classes, arguments, variables and attributes. Words that also have an ordinary meaning in code,
# such as ``kept``, ``share`` or ``own``, are not listed.
RETIRED_NAMES = {
    "HOUSE", "FLOORS", "house", "floors", "room", "rooms", "rounded", "narrowed", "carried", "Pieces", "pieces",
    "lies", "Tape", "tape", "emit", "integrate", "_fed_back", "_direct_less", "why_not_fused", "refusal", "Member",
    "Team", "Parts", "divide", "Crowding", "patience", "worth_a_meeting", "Rounded", "Tiled", "Held", "put_pair",
    "interleave", "turn", "Turning", "told", "said", "Lost", "Refused", "circumstances", "go_on", "refuse_other",
    "refuse_taken", "amend", "_put_back", "standing", "bests", "undominated", "lap",
}  # fmt: skip
RETIRED_NAMES |= {
    "own_process", "WORTH_IT", "PATIENCE", "REACH", "NAMED", "untils", "of_layer", "beaten", "nowhere", "twice",
    "spelled", "torch_has_it", "left_out", "look", "looks", "mine", "held", "cut", "_place", "_places", "_refuse",
    "_as_read", "_success", "_equals", "_misfit",
}  # fmt: skip
RETIRED_CPP_NAMES = RETIRED_NAMES | {"Exact", "In", "share", "taken", "owns", "given", "own", "pack", "scratch"}

_GAP = r"(?:\s|#|//|>)+"
_IS_NONE = r"(?<!there )is none"  # but not "None", the value
_PROSE = re.compile(
    r"\b(?:" + "|".join([_GAP.join(map(re.escape, p.split())) for p in RETIRED_PHRASES] + [*BRITISH]) + r")\b",
    re.IGNORECASE,
)


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("the files are not in a git checkout")
    files = [name for name in listed.stdout.splitlines() if name.endswith(SUFFIXES) and not name.startswith("results/")]
    return [ROOT / name for name in files if name not in EXEMPT and (ROOT / name).exists()]


def _retired_phrases(text: str) -> Iterator[str]:
    for match in [*_PROSE.finditer(text), *re.finditer(_IS_NONE, text)]:
        yield f"{text.count(chr(10), 0, match.start()) + 1}: {match.group()!r}"


def _retired_python_names(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        for field in ("id", "arg", "attr", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str) and (name in RETIRED_NAMES or _PROSE.search(name.replace("_", " "))):
                yield f"{getattr(node, 'lineno', 0)}: name {name!r}"


def _retired_cpp_names(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        code = re.sub(r'"(?:\\.|[^"\\])*"|//.*', "", line)
        for word in RETIRED_CPP_NAMES.intersection(re.findall(r"\w+", code)):
            yield f"{number}: name {word!r}"


def _hits(path: str, text: str) -> list[str]:
    found = list(_retired_phrases(text))
    if path.endswith(".py"):
        found += _retired_python_names(text)
    if path.endswith((".h", ".cc")):
        found += _retired_cpp_names(text)
    return [f"{path}:{hit}" for hit in found]


def test_no_file_uses_a_retired_word() -> None:
    hits = [hit for file in _files() for hit in _hits(str(file.relative_to(ROOT)), file.read_text("utf-8"))]
    assert not hits, "\n".join(["retired words:", *hits])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.py", '"""Owns the loop."""'),
        ("a.py", "# the one front\n# door\n"),
        ("a.py", 'raise ValueError("the optimiser is missing")'),
        ("a.py", "def f(tape):\n    pass"),
        ("a.py", "HOUSE = 1"),
        ("a.py", "x.told()"),
        ("a.py", "class Pieces:\n    pass"),
        ("a.py", "from a import b as told"),
        ("a.py", "f(refusal=True)"),
        ("a.py", "def test_it_is_made_anew():\n    pass"),
        ("a.py", "def test_a_cell_of_ones_own():\n    pass"),
        ("a.py", "# one row a rule"),
        ("a.py", "PATIENCE = 3"),
        ("a.md", "A run goes on\nexactly."),
        ("a.md", "One colour per cell."),
        ("a.h", "// computed anew\n"),
        ("a.cc", "struct Member {};"),
        ("a.cc", "team.divide(4);"),
        ("recipes/a.yaml", "# a rule that is none"),
    ],
)
def test_a_planted_word_is_found(path: str, text: str) -> None:
    assert _hits(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.py", "def extra_repr(self, direct, record, memory_format):\n    return x is None"),
        ("a.py", "# known, and the optimizer behaves\n"),
        ("a.h", 'int rows;  // rows that share a cache line\nconst char* s = "turn";'),
        ("a.md", "Otherwise there is none; four hours of noise, a precise compromise."),
    ],
)
def test_an_ordinary_word_is_not(path: str, text: str) -> None:
    assert not _hits(path, text)
