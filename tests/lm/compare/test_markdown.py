"""Records as Markdown: the documents are those of the records, and what the tables count."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from statefeed.lm import cli, config
from statefeed.lm.compare import benchmarks, markdown, summary
from statefeed.lm.compare.results import Result, to_line
from statefeed.lm.compare.sources import Found, read
from statefeed.lm.compare.verdicts import DEFAULT_TERMS

README = ROOT / "README.md"
MACHINES = [
    folder for name in ("zen5", "xeon-amx") for folder in sorted((ROOT / "results" / "bench").glob(f"{name}-*"))
]

CELLS = [
    ROOT / "results" / "runs" / "quickstart" / name
    for name in ("cells-bf16.jsonl", "rates.jsonl", "shakespeare.jsonl", "sizes-bf16.jsonl", "schedules-bf16.jsonl")
]


def test_documents_are_those_of_the_records(tmp_path: Path) -> None:
    again = "run `make measured` and commit what it writes"
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert page == markdown.page(read([ROOT / "results" / "bench", ROOT / "results" / "runs"])), again
    (tmp_path / "README.md").write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    summary.update_summary(tmp_path / "README.md", read(MACHINES))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README.read_text(encoding="utf-8"), again
    results = ROOT / "results" / "README.md"
    (tmp_path / "results.md").write_text(results.read_text(encoding="utf-8"), encoding="utf-8")
    summary.update_verdicts(tmp_path / "results.md", read(CELLS), DEFAULT_TERMS)
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == results.read_text(encoding="utf-8"), again


def test_the_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machines = list(map(str, MACHINES))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{summary.BEGIN}old{summary.END}after\n", encoding="utf-8")
    assert cli.main(["report", *machines, f"--summary={readme}"]) == 0
    expected = f"before\n{summary.BEGIN}\n{summary.summary(read(MACHINES))}{summary.END}after\n"
    assert readme.read_text(encoding="utf-8") == expected
    assert cli.main(["report", *machines, f"--markdown={tmp_path / 'measured.md'}"]) == 0
    assert (tmp_path / "measured.md").read_text(encoding="utf-8") == markdown.page(read(MACHINES))
    readme.write_text("no marks\n")
    capsys.readouterr()
    assert cli.main(["report", *machines, f"--summary={readme}"]) == 2
    assert "--summary must name a file with the lines" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "measured.md"]  # and no report.html


def test_every_committed_figure_is_shown_by_a_document() -> None:
    shown = set(re.findall(r"\(figures/([^)]+)\)", (ROOT / "results" / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in (ROOT / "results" / "figures").iterdir()} == shown
    assert {path.suffix for path in (ROOT / "results").rglob("*.*")} == {".md", ".jsonl", ".svg"}


def test_without_records_there_is_no_number() -> None:
    text = markdown.page(Found())
    assert text.count("No records yet.") == 8
    for stated in ("below 1", "256 units", "64 units", "0.125", "0.5", "S4D", "0.167", "0.01"):
        text = text.replace(stated, "")
    assert not re.search(r"\d", text)


MACHINE = "a CPU, family 1"


def spread(number: float) -> dict[str, float]:
    return {"median": number, "min": number, "max": number}


def leave_run(
    folder: Path, rule: float | str, seed: int, perplexity: float, machine: str = MACHINE, **train: Any
) -> None:
    model = config.Model(feedback=rule, layers=1, width=8)
    recipe = config.Config(model=model, train=config.Train(batch=10, context=100, epochs=2, seed=seed, **train))
    metadata = {"corpus": "text", "parameters": 7, "torch": "2", "threads": 2, "machine": f"{machine}, 8 cores, Linux"}
    rows = [{"step": k, "epochs": k, "seconds": k, "perplexity": p} for k, p in ((1, perplexity), (2, perplexity + 5))]
    result = Result(dataclasses.asdict(recipe), metadata, "finished", rows, [], {}, None, None, None)
    with (folder / "compare.jsonl").open("a") as file:
        file.write(to_line(result))


def leave_times(file: Path, machine: str = MACHINE, **times: float) -> None:
    recipe = {"cell": "gru", "layers": 1, "width": 8, "batch": 10, "context": 100, "dtype": "float32", "recipe": "r"}
    record = {**common(machine), **recipe, "bench": "training", "implementation": "statefeed", "corpus": "words"}
    figures = {"tokens_per_s": spread(1), "times_faster_than": {}}
    lines = [{**record, **figures, "variant": rule, "step_ms": {"median": ms}} for rule, ms in times.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(folder: Path) -> list[str]:
    return markdown.page(read([folder])).splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Comparisons in one folder, benchmarks in another, as under results/."""
    for name in ("runs", "bench"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_the_frontier_is_the_pareto_front(folder: Path) -> None:
    for rule, seed, perplexity in (("bptt", 1, 100), ("dsf", 1, 110), ("dsf", 2, 112), ("gate", 1, 120), (0.5, 1, 90)):
        leave_run(folder / "runs", rule, seed, perplexity)
    leave_times(folder / "bench" / "training.jsonl", bptt=100.0, dsf=50.0, gate=100.0)
    lines = page_of(folder)
    assert "| rule | seeds | best validation perplexity | ms per step, a CPU, family 1, 2 threads |" in lines
    assert "| `bptt` | 1 | 100.0 | **100** |" in lines
    assert "| `dsf` | 2 | 111.0 (110.0 to 112.0) | **50** |" in lines
    assert "| `gate` | 1 | 120.0 | 100 |" in lines
    assert "| `0.5` | 1 | 90.0 |  |" in lines  # whose time nobody took


def test_a_rule_has_one_name_and_a_rate_its_own_row(folder: Path) -> None:
    leave_run(folder / "runs", 0.0, 1, 100.0)
    leave_run(folder / "runs", "ft-bptt", 2, 110.0)
    leave_run(folder / "runs", "dsf", 1, 90.0, lr=1e-3)
    leave_run(folder / "runs", "dsf", 2, 95.0, lr=2e-3)
    rows = [line for line in page_of(folder) if line.startswith("| `")]
    assert rows == [
        "| `dsf` at 0.001 | 1 | 90.0 |",
        "| `dsf` at 0.002 | 1 | 95.0 |",
        "| `ft-bptt` | 2 | 105.0 (100.0 to 110.0) |",
    ]


def test_seeds_of_two_machines_are_one_rule_and_times_have_a_column_each(folder: Path) -> None:
    for seed in (1, 2):
        machine = f"a CPU, family {seed}"
        leave_run(folder / "runs", "dsf", seed, 110.0 + seed, machine)
        leave_times(folder / "bench" / f"training{seed}.jsonl", machine, dsf=50.0 * seed)
    assert "| `dsf` | 2 | 111.5 (111.0 to 112.0) | **50** | **100** |" in page_of(folder)


def test_times_of_another_machine_are_left_out(folder: Path) -> None:
    leave_run(folder / "runs", "bptt", 1, 100.0)
    assert "| `bptt` | 1 | 100.0 |" in page_of(folder)
    leave_times(folder / "bench" / "training.jsonl", "a CPU, family 2", bptt=100.0)
    assert "| `bptt` | 1 | 100.0 |" in page_of(folder)


def test_runs_of_other_tasks_are_not_compared_and_the_place_is_no_task(folder: Path) -> None:
    leave_run(folder / "runs", "bptt", 1, 100.0)
    leave_run(folder / "runs", "dsf", 1, 90.0, weight_decay=0.1)
    leave_run(folder / "runs", "gate", 1, 95.0, weight_decay=0.1, device="cpu")
    lines = page_of(folder)
    titles = [line for line in lines if "train.weight_decay=" in line]
    assert len(titles) == 2
    assert not any("train.device" in line for line in lines)
    assert lines.index("| `dsf` | 1 | 90.0 |") + 1 == lines.index("| `gate` | 1 | 95.0 |")


def test_a_run_that_is_there_twice_counts_once_and_one_that_diverged_not_at_all(folder: Path) -> None:
    for _ in range(2):
        leave_run(folder / "runs", "dsf", 1, 105.0)
    path = folder / "runs" / "compare.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    line["config"]["train"]["seed"] = 2
    with path.open("a") as file:
        file.write(json.dumps({**line, "outcome": "diverged"}) + "\n")
    assert "| `dsf` | 1 | 105.0 |" in page_of(folder)


def test_benchmarks_become_one_table_a_machine(tmp_path: Path) -> None:
    from statefeed import bench

    output = tmp_path / "layers.jsonl"
    assert (
        bench.main(["layers", "--smoke", "--cells=gru", "--rules=dsf", "--dtypes=float32", f"--output={output}"]) == 0
    )
    assert markdown.page(read([tmp_path])).count("No records yet.") == 8  # a trial is no measurement
    records = [{**json.loads(line), "repeats": 9} for line in output.read_text().splitlines()]
    output.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = markdown.page(read([tmp_path]))
    assert re.search(r"^\| cell, T x B x H \|.* `dsf` \|", text, re.MULTILINE)
    assert re.search(r"^\| gru 5x2x16 float32 (\| \d+\.\d\d )+\|$", text, re.MULTILINE)
    fused = "fused kernels (compiled here for x86-64-v9, 2 threads)"
    output.write_text("".join(json.dumps({**r, "kernels": {"forward": fused}}) + "\n" for r in records))
    assert ", kernels for x86-64-v9:\n" in summary.summary(read([tmp_path]))


def common(machine: str = MACHINE) -> dict[str, Any]:
    """What every record of a benchmark has."""
    cpu = {"cpu": machine, "gpu": None}
    return {
        "machine": cpu,
        "threads": 2,
        "versions": {"torch": "2.13", "statefeed": "0.2.0"},
        "repeats": 5,
        "date": "2026-11-24",
    }


def test_packed_layers_have_a_table_of_their_own_with_both_rivals(tmp_path: Path) -> None:
    record = {"bench": "layers", "implementation": "statefeed", "dtype": "float32", "ms": spread(1.0), **common()}
    record |= {"T": 9, "B": 2, "H": 4, "layers": 1, "bidirectional": False, "pass": "training", "cell": "gru"}
    best, padded = "torch.nn at its best", "torch.nn padded"
    kinds = [
        ({"packed": False, "variant": "bptt"}, {best: {"median": 2.0}}),
        ({"packed": False, "variant": "dsf"}, {best: {"median": 3.0}}),
        ({"packed": True, "variant": "bptt"}, {best: {"median": 40.0}, padded: {"median": 1.5}}),
        ({"packed": True, "variant": "bptt", "layers": 2}, {best: {"median": 7.0}, padded: {"median": 7.0}}),
        ({"packed": False, "variant": "bptt", "pass": "forward"}, {best: {"median": 8.0}}),
    ]
    lines = [json.dumps(record | which | {"times_faster_than": ratios}) + "\n" for which, ratios in kinds]
    (tmp_path / "layers.jsonl").write_text("".join(lines))
    found = read([tmp_path])
    text = summary.summary(found)
    assert "| 9 x 2 x 4 | 2.0 / 3.0 |" in text
    assert "| 9 x 2 x 4 | 40.0 / 1.5 |" in text
    assert "7.0" not in text
    assert "8.0" not in text
    page = markdown.page(found)
    for row in ("gru 9x2x4 float32", "gru 9x2x4 packed float32", "gru 9x2x4 2 layers packed float32"):
        assert f"| {row} |" in page
    assert "| gru 9x2x4 forward float32 | 8.00 |" in page


def test_training_end_to_end_is_one_table_a_machine_and_recipe(tmp_path: Path) -> None:
    record = {"bench": "training", "corpus": "sentences", "dtype": "float32", "step_ms": {"median": 9.0}, **common()}
    record |= {"cell": "gru", "layers": 1, "width": 256, "batch": 128, "context": 64}
    lines = [
        {"implementation": "torch.nn", "variant": "as shipped", "tokens_per_s": spread(1000.0)},
        {"implementation": "statefeed", "variant": "dsf", "tokens_per_s": spread(2500.4)},
    ]
    ratios = [{"torch.nn at its best": {"median": r}, "published float32": {"median": 2 * r}} for r in (1.0, 2.5)]
    lines = [{**record, **line, "times_faster_than": r} for line, r in zip(lines, ratios, strict=True)]
    trial = {**lines[0], "repeats": 1}
    other = {**lines[1], "recipe": "another", "corpus": "blocks", "tokens_per_s": spread(7.0)}
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, trial, other]))
    text = markdown.page(read([tmp_path]))
    assert "a CPU, family 1, 2 threads, torch 2.13; ptb-gru-1x256, sentences." in text
    assert text.index("torch 2.13; another, blocks.") > text.index("| 2,500 | ")
    assert "7 tokens" not in summary.summary(read([tmp_path]))
    assert text.count("| float32 | torch.nn, as shipped | 1,000 | 2.00 | 1.00 |") == 1
    assert "| float32 | `dsf` | 2,500 | 5.00 | 2.50 |" in text.splitlines()


def test_recall_over_a_delay_is_shown_as_older_records_have_it(tmp_path: Path) -> None:
    record = {"bench": "recall", "delay": 50, "steps": 1500, **common()}
    found = {"gate": [(0.2, None), (0.9, 700)], "ramp(0.9)": [(1.0, 500), (0.96, 600)], "ft-bptt": [(0.1, None)]}
    lines = [
        {**record, "variant": rule, "accuracy": accuracy, "learnt": step}
        for rule, runs in found.items()
        for accuracy, step in runs
    ]
    (tmp_path / "recall.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [line for line in markdown.page(read([tmp_path])).splitlines() if line.startswith("| `")]
    assert rows == [
        "| `ramp(0.9)` | 0.98 (0.96 to 1.00) | 2 of 2 | 550 |",
        "| `gate` | 0.55 (0.20 to 0.90) | 1 of 2 | 700 |",
        "| `ft-bptt` | 0.10 (0.10 to 0.10) | 0 of 1 | - |",
    ]


def test_state_tracking_is_shown_by_cell_and_rule_over_the_seeds(tmp_path: Path) -> None:
    record = {"bench": "tracking", "T": 10, "every": 5, "H": 64, "steps": 4000, "lr": 0.003, **common(), "repeats": 3}
    found = {
        ("mingru", "bptt"): [(0.5, 0.5, None), (0.6, 0.5, None)],
        ("gru", "gate"): [(1.0, 0.98, 700), (0.9, 0.5, None)],
    }
    lines = [
        {**record, "cell": cell, "variant": rule, "accuracy": short, "accuracy_twice": long, "learnt": step}
        for (cell, rule), runs in found.items()
        for short, long, step in runs
    ]
    (tmp_path / "tracking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = markdown.page(read([tmp_path]))
    assert "10 bits, asked for after every 5; 64 units, 4,000 steps of training; a CPU" in text
    assert [line for line in text.splitlines() if "` | 0.003" in line] == [
        "| gru `gate` | 0.003 | 0.95 (0.90 to 1.00) | 0.74 (0.50 to 0.98) | 1 of 2 | 700 |",
        "| mingru `bptt` | 0.003 | 0.55 (0.50 to 0.60) | 0.50 (0.50 to 0.50) | 0 of 2 | - |",
    ]


def test_an_slstm_has_a_row_for_each_of_its_baselines(tmp_path: Path) -> None:
    record = {"bench": "layers", "implementation": "statefeed", "variant": "dsf", "cell": "slstm", **common()}
    record |= {"T": 64, "B": 32, "H": 256, "dtype": "float32"}
    ratios = {"torch.compile": {"median": 9.0}, "xlstm": {"median": 12.5}}
    (tmp_path / "layers.jsonl").write_text(json.dumps({**record, "times_faster_than": ratios}) + "\n")
    lines = markdown.page(read([tmp_path])).splitlines()
    assert "| slstm 64x32x256 float32, compiled step | 9.00 |" in lines
    assert "| slstm 64x32x256 float32, xlstm package | 12.50 |" in lines
    assert "SLSTM" not in summary.summary(read([tmp_path]))


def test_differences_in_the_documents_are_those_of_the_records() -> None:
    """Every difference with an interval is one that measured.md has, and its verdict follows from the interval."""
    measured = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    number = r"[+-][\d.]+"
    words = re.compile(
        rf"({number}% \(({number}) to ({number})\))(?::\s(not decided|better|worse|holds|does not hold))?"
    )
    pages = [README, ROOT / "results" / "README.md", ROOT / "docs" / "choosing.md", ROOT / "docs" / "when-not.md"]
    found = 0
    for line in (line for page in pages for line in page.read_text(encoding="utf-8").splitlines()):
        for difference, low, high, verdict in words.findall(line):
            found += 1
            assert difference in measured, difference
            percent = re.search(r"at most (\d+)% above", line)
            limit = float(percent[1]) if percent and verdict in ("holds", "does not hold") else 0.0
            above, below = float(low) > limit, float(high) < limit
            expected = {"better": below, "holds": below, "worse": above, "does not hold": above}
            assert expected.get(verdict, True), line
            assert verdict != "not decided" or percent or not (above or below), line
    assert found > 20


def test_the_adding_problem_is_shown_by_cell_and_rule_over_the_seeds(tmp_path: Path) -> None:
    record = {"bench": "adding", "T": 200, "H": 64, "steps": 1500, "lr": 0.002, **common(), "repeats": 3}
    found = {
        ("lstm", "dsf"): [(0.2, None, None), (0.1, None, None), (0.16, None, None)],
        ("gru", "log_spaced(200)@0.6/bptt"): [(0.001, 700, 20.0), (0.002, 900, 24.0), (0.05, None, None)],
    }
    lines = [
        {**record, "cell": cell, "variant": rule, "seed": seed, "error": error, "learnt": step, "cpu_seconds": seconds}
        for (cell, rule), runs in found.items()
        for seed, (error, step, seconds) in enumerate(runs)
    ]
    (tmp_path / "adding.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = markdown.page(read([tmp_path]))
    assert "Adding problem: 200 steps, 64 units, 1,500 steps of training; a CPU" in text
    assert [line for line in text.splitlines() if "` | 0.002" in line] == [
        "| gru `log_spaced(200)@0.6/bptt` | 0.002 | 0.0020 (0.0010 to 0.0500) | 2 of 3 | 800 | 22 |",
        "| lstm `dsf` | 0.002 | 0.1600 (0.1000 to 0.2000) | 0 of 3 | - | - |",
    ]


def test_every_task_of_long_memory_has_one_table_best_rule_first(tmp_path: Path) -> None:
    rates = {"0.002": 0.4, "0.004": 0.5, "0.008": None}
    record = {"H": 64, "steps": 1500, "lr": 0.004, "rates": rates, **common(), "repeats": 3, "cell": "gru"}
    solved, late, edge, diverged = (0.95, 700, 20.0), (1.0, 1400, 41.0), (0.5, None, None), (None, None, None)
    found = {"dsf": [edge, diverged, edge], "bptt": [solved, late, edge], "0.9": [solved, solved, edge]}
    lines = [
        {
            **record,
            "bench": bench,
            "T": T,
            "variant": rule,
            "seed": seed,
            "accuracy": accuracy,
            "learnt": step,
            "cpu_seconds": time,
        }
        for bench, T in (("digits", 1024), ("recall", 200))
        for rule, runs in found.items()
        for seed, (accuracy, step, time) in enumerate(runs)
    ]
    lines.append({**lines[-1], "bench": "adding", "error": None, "lr": 0.002, "learnt": None})
    del lines[-1]["accuracy"]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = markdown.page(read([tmp_path]))
    rows = [
        "| gru `0.9` | 0.004 | 0.950 (0.500 to 0.950) | 2 of 3 | 700 | 20 |",
        "| gru `bptt` | 0.004 | 0.950 (0.500 to 1.000) | 2 of 3 | 1,050 | 30 |",
        "| gru `dsf` | 0.004 | 0.500 (0.000 to 0.500) | 0 of 3 | - | - |",
    ]
    for title in ("Recall of the first symbol: 200 steps", "Digits pixel by pixel: 1,024 steps"):
        below = text[text.index(title) :].splitlines()
        assert below[2].startswith("| cell, rule | rate | accuracy, median (min to max) | solved by |")
        assert below[4:7] == rows
    assert "| gru `0.9` | 0.002 (edge) | inf (inf to inf) | 0 of 1 | - | - |" in text.splitlines()
    assert benchmarks.section(read([tmp_path]).benchmarks)


def test_a_seed_that_was_run_again_counts_once_and_all_its_rates_were_tried(tmp_path: Path) -> None:
    record = {"bench": "adding", "T": 200, "H": 64, "steps": 1500, "lr": 0.064, **common(), "repeats": 3}
    record |= {"cell": "lstm", "variant": "bptt", "cpu_seconds": 2.0}
    first = [
        {**record, "seed": k, "rates": {"0.032": 0.1, "0.064": 0.05}, "error": 0.2, "learnt": None} for k in (1, 2)
    ]
    again = [
        {**record, "seed": k, "rates": {"0.064": 0.05, "0.128": None}, "error": 0.001, "learnt": 300} for k in (1, 2)
    ]
    (tmp_path / "adding.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*first, *again]))
    assert "| lstm `bptt` | 0.064 | 0.0010 (0.0010 to 0.0010) | 2 of 2 | 300 | 2 |" in markdown.page(read([tmp_path]))
