"""The documentation: every Python block runs, every path and name that it gives exists, its numbers are recorded."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import statefeed

HOUSE = Path(__file__).resolve().parent.parent
DOCS = HOUSE / "docs"
PAGES = [HOUSE / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\S*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Python runs; directives of Sphinx are built; what cannot run here says console.
KNOWN = {"python", "console", "{toctree}", "{eval-rst}", "{include}"}

page = pytest.mark.parametrize("name", TEXTS)


@page
def test_every_python_block_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": f"docs.{name}"}
    for block in FENCE.finditer(TEXTS[name]):
        if block[1] == "python":
            line = TEXTS[name].count("\n", 0, block.start(2))
            code = compile("\n" * line + block[2], f"{name}.md", "exec")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", ".*the CPU kernels cannot be used")  # a machine without a compiler
                exec(code, namespace)


def test_the_tables_on_scaling_are_what_its_blocks_print(capsys):
    namespace = {}
    for block in FENCE.finditer(TEXTS["scaling"]):
        if block[1] == "python":
            exec(block[2], namespace)
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in TEXTS["scaling"].splitlines() if re.match(r"\| (gru|lstm|bptt|\d)", line)]
    assert rows == printed


@page
def test_every_block_says_what_it_is(name):
    assert {block[1] for block in FENCE.finditer(TEXTS[name])} <= KNOWN


# Paths and names -----------------------------------------------------------------------------------------------------


def names_in(file):
    """Everything defined in a Python file, methods and nested classes by their dotted names."""

    def walk(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))

    return set(walk(ast.parse(file.read_text(encoding="utf-8")).body, ""))


def missing(reference):
    """Why `path`, `path.py:name` or `path.py::test` cannot be found; None if it can."""
    path, _, name = re.sub("::", ":", reference).partition(":")
    file = HOUSE / path
    if not file.exists():
        return f"{path} does not exist"
    if name and name not in names_in(file):
        return f"{path} defines no {name}"
    return None


REFERENCE = re.compile(r"`((?:statefeed|tests|recipes|examples|docs)/[\w/.*-]*(?:::?[\w.]+)?)`")
LINK = re.compile(r"\[`([^`]+)`\]\((\.\./[^)]+)\)")


@page
def test_every_path_and_name_exists(name):
    assert not [why for found in REFERENCE.findall(TEXTS[name]) if (why := missing(found))]


@page
def test_a_link_leads_where_its_text_says(name):
    for text, target in LINK.findall(TEXTS[name]):
        assert target == f"../{text.partition(':')[0]}"


@page
def test_links_between_pages_lead_somewhere(name):
    for target in re.findall(r"\]\((\w[\w-]*\.md)[^)]*\)", TEXTS[name]):
        assert (DOCS / target).exists()


@pytest.mark.parametrize(
    "reference", ["statefeed/nowhere.py", "statefeed/cells.py:nobody", "tests/test_scan.py::test_x"]
)
def test_what_is_not_there_is_found_missing(reference):
    assert REFERENCE.findall(f"`{reference}`") == [reference]
    assert missing(reference)


SECTIONS = re.split(r"^## ", TEXTS["mathematics"], flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_every_equation_has_its_code_and_its_test(section):
    linked = [text for text, _ in LINK.findall(section)]
    assert any(text.startswith("statefeed/") and ":" in text for text in linked)
    assert any(text.startswith("tests/") and "::test_" in text for text in linked)


def test_the_reference_has_the_whole_front_door():
    listed = set(re.findall(r"^\.\. auto\w+:: statefeed\.(\w+)$", TEXTS["api"], re.MULTILINE))
    assert listed == set(statefeed.__all__)


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    pytest.importorskip("yaml", reason="docs/measured.py reads recipes")
    spec = importlib.util.spec_from_file_location("measured", DOCS / "measured.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_are_those_of_the_records(measured):
    again = "run `python docs/measured.py` and commit docs/measured.md and README.md"
    assert TEXTS["measured"] == measured.page(HOUSE / "results"), again
    readme = (HOUSE / "README.md").read_text(encoding="utf-8")
    assert readme == measured.with_summary(readme, HOUSE / "results"), again


def test_without_records_there_is_no_number(measured, tmp_path):
    text = measured.page(tmp_path)
    assert text.count("No records yet.") == 4
    for stated in ("below 1", "256 units", "64 units", "0.125"):
        text = text.replace(stated, "")
    assert not re.search(r"\d", text)


FACTS = {"threads": 2, "machine": "a CPU, family 1, 8 cores, Linux"}


def leave_run(folder, rule, seed, perplexity, decay=0.0):
    folder.mkdir()
    train = {"batch": 10, "context": 100, "lr": 1e-3, "epochs": 2, "steps": None, "seed": seed}
    config = {
        "data": {"corpus": "text", "path": "somewhere", "tokens": "word"},
        "model": {"cell": "gru", "feedback": rule, "layers": 1, "width": 8, "block": "plain", "dropout": 0.0},
        "train": {**train, "schedule": "linear", "weight_decay": decay},
        "run": {"dir": str(folder)},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "record.json").write_text(json.dumps(FACTS))
    rows = [{"split": "train", "perplexity": 99}]
    rows += [{"split": "valid", "perplexity": p} for p in (perplexity, perplexity + 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def leave_times(file, **times):
    recipe = {"cell": "gru", "layers": 1, "width": 8, "batch": 10, "context": 100, "dtype": "float32", "recipe": "r"}
    record = {**MACHINE, **recipe, "bench": "training", "implementation": "statefeed", "corpus": "words"}
    figures = {"tokens_per_s": {"median": 1}, "times_faster_than": {}}
    lines = [{**record, **figures, "variant": rule, "step_ms": {"median": ms}} for rule, ms in times.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_frontier_is_what_no_rule_beats_in_both(measured, tmp_path):
    leave_run(tmp_path / "a", "bptt", 1, 100.0)
    leave_run(tmp_path / "b", "dsf", 1, 110.0)
    leave_run(tmp_path / "c", "dsf", 2, 112.0)
    leave_run(tmp_path / "d", "gate", 1, 120.0)
    leave_run(tmp_path / "e", 0.5, 1, 90.0)
    leave_times(tmp_path / "training.jsonl", bptt=100.0, dsf=50.0, gate=100.0)
    lines = measured.page(tmp_path).splitlines()
    assert "| rule | seeds | best validation perplexity | ms per step, a CPU, family 1, 2 threads |" in lines
    assert "| `bptt` | 1 | 100.0 | **100** |" in lines
    assert "| `dsf` | 2 | 111.0 (110.0 to 112.0) | **50** |" in lines
    assert "| `gate` | 1 | 120.0 | 100 |" in lines
    assert "| `0.5` | 1 | 90.0 |  |" in lines  # whose time nobody took


def test_seeds_of_two_machines_are_one_rule_and_times_have_a_column_each(measured, tmp_path):
    for seed, family in ((1, 1), (2, 2)):
        leave_run(tmp_path / str(seed), "dsf", seed, 110.0 + seed)
        record = tmp_path / str(seed) / "record.json"
        record.write_text(record.read_text().replace("family 1", f"family {family}"))
        leave_times(tmp_path / f"training{seed}.jsonl", dsf=50.0 * seed)
        times = tmp_path / f"training{seed}.jsonl"
        times.write_text(times.read_text().replace("family 1", f"family {family}"))
    assert "| `dsf` | 2 | 111.5 (111.0 to 112.0) | **50** | **100** |" in measured.page(tmp_path).splitlines()


def test_times_of_another_machine_are_not_told(measured, tmp_path):
    leave_run(tmp_path / "a", "bptt", 1, 100.0)
    leave_times(tmp_path / "training.jsonl", bptt=100.0)
    found = tmp_path / "training.jsonl"
    found.write_text(found.read_text().replace("family 1", "family 2"))
    assert "| `bptt` | 1 | 100.0 |" in measured.page(tmp_path).splitlines()


def test_runs_alone_tell_no_time(measured, tmp_path):
    leave_run(tmp_path / "a", "bptt", 1, 100.0)
    assert "| `bptt` | 1 | 100.0 |" in measured.page(tmp_path).splitlines()


def test_runs_of_other_settings_are_not_compared(measured, tmp_path):
    leave_run(tmp_path / "a", "bptt", 1, 100.0)
    leave_run(tmp_path / "b", "dsf", 1, 90.0, decay=0.1)
    lines = measured.page(tmp_path).splitlines()
    assert sum("train.weight_decay=" in line for line in lines) == 2


def test_records_of_a_comparison_are_read_like_runs(measured, tmp_path):
    leave_run(tmp_path / "a", "bptt", 1, 100.0)
    config = json.loads((tmp_path / "a" / "config.yaml").read_text())
    config["model"]["feedback"] = "dsf"
    line = {"config": config, "facts": FACTS, "outcome": "finished", "valid": [{"perplexity": 105.0}]}
    lines = [line, line, {**line, "outcome": "diverged"}]
    (tmp_path / "comparison.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| `dsf` | 1 | 105.0 |" in measured.page(tmp_path).splitlines()


def test_benchmarks_become_one_table_a_machine(measured, tmp_path, capsys):
    from statefeed import bench

    output = tmp_path / "layers.jsonl"
    assert (
        bench.main(["layers", "--smoke", "--cells=gru", "--rules=dsf", "--dtypes=float32", f"--output={output}"]) == 0
    )
    assert measured.page(tmp_path).count("No records yet.") == 4  # a trial is no measurement
    records = [{**json.loads(line), "repeats": 9} for line in output.read_text().splitlines()]
    output.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = measured.page(tmp_path)
    assert re.search(r"^\| cell, T x B x H \|.* `dsf` \|", text, re.MULTILINE)
    assert re.search(r"^\| gru 5x2x16 float32 (\| \d+\.\d\d )+\|$", text, re.MULTILINE)
    fused = "fused kernels (compiled here for x86-64-v9, 2 threads)"
    output.write_text("".join(json.dumps({**r, "kernels": {"forward": fused}}) + "\n" for r in records))
    assert ", kernels for x86-64-v9:\n" in measured.summary(tmp_path)


CPU = {"cpu": "a CPU, family 1", "gpu": None}
MACHINE = {"machine": CPU, "threads": 2, "versions": {"torch": "2.13"}, "repeats": 5, "date": "2026-11-24"}


def test_training_end_to_end_is_one_table_a_machine_and_recipe(measured, tmp_path):
    record = {"bench": "training", "corpus": "sentences", "dtype": "float32", "step_ms": {"median": 9.0}, **MACHINE}
    record |= {"cell": "gru", "layers": 1, "width": 256, "batch": 128, "context": 64}
    lines = [
        {"implementation": "torch.nn", "variant": "as shipped", "tokens_per_s": {"median": 1000.0}},
        {"implementation": "statefeed", "variant": "dsf", "tokens_per_s": {"median": 2500.4}},
    ]
    ratios = [{"torch.nn at its best": {"median": r}, "published float32": {"median": 2 * r}} for r in (1.0, 2.5)]
    lines = [{**record, **line, "times_faster_than": r} for line, r in zip(lines, ratios, strict=True)]
    trial = {**lines[0], "repeats": 1}
    other = {**lines[1], "recipe": "another", "corpus": "blocks", "tokens_per_s": {"median": 7.0}}
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, trial, other]))
    text = measured.page(tmp_path)
    assert "a CPU, family 1, 2 threads, torch 2.13; ptb-gru-1x256, sentences." in text
    assert text.index("torch 2.13; another, blocks.") > text.index("| 2,500 | ")
    assert "7 tokens" not in measured.summary(tmp_path)
    assert text.count("| float32 | torch.nn, as shipped | 1,000 | 2.00 | 1.00 |") == 1
    assert "| float32 | `dsf` | 2,500 | 5.00 | 2.50 |" in text.splitlines()


def test_recall_is_told_over_the_seeds_best_first(measured, tmp_path):
    record = {"bench": "recall", "delay": 50, "steps": 1500, **MACHINE}
    found = {"gate": [(0.2, None), (0.9, 700)], "ramp(0.9)": [(1.0, 500), (0.96, 600)], "ft-bptt": [(0.1, None)]}
    lines = [
        {**record, "variant": rule, "accuracy": accuracy, "learnt": step}
        for rule, runs in found.items()
        for accuracy, step in runs
    ]
    (tmp_path / "recall.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [line for line in measured.page(tmp_path).splitlines() if line.startswith("| `")]
    assert rows == [
        "| `ramp(0.9)` | 0.98 (0.96 to 1.00) | 2 of 2 | 550 |",
        "| `gate` | 0.55 (0.20 to 0.90) | 1 of 2 | 700 |",
        "| `ft-bptt` | 0.10 (0.10 to 0.10) | 0 of 1 | - |",
    ]


# Built ---------------------------------------------------------------------------------------------------------------


def test_it_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason='the documentation is built with pip install "statefeed[docs]"')
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), str(DOCS)]
    built = subprocess.run([*command, str(tmp_path / "html")], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    assert all(f'id="statefeed.{name}"' in reference for name in statefeed.__all__)
    assert all(f">{section}<" in reference for section in ("Gradient", "Cost"))
    assert "<math" in (tmp_path / "html" / "mathematics.html").read_text(encoding="utf-8")
    for built_page in (tmp_path / "html").glob("*.html"):  # readable without a network
        assert not re.search(r'<(?:script|link)[^>]+(?:src|href)="(?:https?:)?//', built_page.read_text("utf-8"))
