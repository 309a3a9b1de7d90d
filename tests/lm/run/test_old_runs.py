"""Runs, comparisons and benchmarks made before keys and rules were renamed: resumed, scored, sampled, reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, metrics

from statefeed.lm import cli, migration
from statefeed.lm.compare.results import from_line, to_line
from statefeed.lm.compare.sources import read
from statefeed.lm.config import Train

# Both of commit 634e57b.
RUN = Path(__file__).parent / "old_run"  # 12 steps, of which the checkpoint of step 7 was kept
COMPARISON = ROOT / "tests" / "lm" / "compare" / "old_compare.jsonl"


@pytest.fixture
def old(text: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(RUN, tmp_path / "run")
    recipe = folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace("path: story.txt", f"path: {text}"))
    return folder


def close(rows: list[dict[str, Any]]) -> list[Any]:
    """Rows to compare with those of another machine, which rounds differently."""
    return [
        {key: value if isinstance(value, str) else pytest.approx(value, rel=1e-4) for key, value in row.items()}
        for row in rows
    ]


def test_it_is_resumed(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(old)
    assert cli.main(["train", "--resume", str(old)]) == 0
    assert "resuming after step 7" in capsys.readouterr().out
    assert metrics(old) == close(before)
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    assert ["optimiser_ms" in row for row in steps] == [step <= 7 for step in range(1, 13)]
    assert ["optimizer_ms" in row for row in steps] == [step > 7 for step in range(1, 13)]
    (result,) = read([old]).results
    assert (result.outcome, result.rule) == ("finished", "calibrated")
    assert set(result.ms) == {"data", "forward", "backward", "optimizer"}


def test_it_is_scored_and_sampled(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(old)]) == 0
    valid = next(row for row in reversed(metrics(old)) if row["split"] == "valid")
    assert f"perplexity {valid['perplexity']:.2f}" in capsys.readouterr().out
    assert cli.main(["generate", str(old), "--tokens=5"]) == 0


def test_a_comparison_is_reported_and_written_under_the_names_of_today(tmp_path: Path) -> None:
    results = read([COMPARISON]).results
    assert [result.rule for result in results] == ["torch", "dsf", "ft-bptt"]
    assert [result.get("train.state_reset_prob") for result in results] == [0.05] * 3
    assert all(set(result.ms) == {"data", "forward", "backward", "optimizer"} for result in results)
    (tmp_path / "compare.jsonl").write_text("".join(map(to_line, results)))
    assert read([tmp_path]).results == results
    written = (tmp_path / "compare.jsonl").read_text()
    assert written.count('"version": 3') == 3
    assert not any(f'"{key}"' in written for key in ("facts", "restart", "optimiser"))
    assert cli.main(["report", str(COMPARISON), str(tmp_path), "-o", str(tmp_path / "report.html")]) == 0


def test_keys_of_today_stay_as_they_are() -> None:
    recipe = {"train": {"state_reset_prob": 0.5, "optimizer": "adam"}}
    assert migration.recipe(recipe) == recipe
    assert migration.metrics_row({"optimizer_ms": 1.0}) == {"optimizer_ms": 1.0}
    assert migration.log_state({}) == {}
    assert hasattr(Train(), "state_reset_prob")


# A rule of a version before 0.2, and the same program today.
RULES = {
    "bptt": "torch",
    "fused-bptt": "bptt",
    "dsf@0.5/bptt": "dsf@0.5/torch",
    "dsf@0.5/fused-bptt": "dsf@0.5/bptt",
    "fused-bptt@0.3/gate+1@0.6/bptt": "bptt@0.3/gate+1@0.6/torch",
    "dsf@0.5/ft-bptt": "dsf@0.5/ft-bptt",
    "gate+1": "gate+1",
}


def wrong(names: dict[str, str]) -> list[str]:
    """The rules that a mapping of names gets wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migration, "RULE_NAMES", names)
        return [old for old, today in RULES.items() if migration.rule(old) != today]


def test_rules_have_the_names_of_today() -> None:
    assert not wrong({"bptt": "torch", "fused-bptt": "bptt"})
    assert len(wrong({"bptt": "bptt", "fused-bptt": "bptt"})) == 3
    assert len(wrong({"bptt": "torch", "fused-bptt": "torch"})) == 3
    assert migration.rule(0.5) == 0.5


@pytest.mark.parametrize(
    ("version", "rule"),
    [("0.1.0", "torch"), ("0.1.9", "torch"), (None, "torch"), ("0.2.0", "bptt"), ("0.10.0", "bptt"), ("1.0", "bptt")],
)
def test_the_version_that_began_a_run_decides(version: str | None, rule: str) -> None:
    assert migration.run_recipe({"model": {"feedback": "bptt"}}, version) == {"model": {"feedback": rule}}
    assert migration.benchmark({"variant": "bptt", "versions": {"statefeed": version}})["variant"] == rule


def test_a_cell_without_rules_keeps_its_name() -> None:
    sections = {"model": {"cell": "s4d", "feedback": "bptt"}}
    assert migration.run_recipe(sections, "0.1.0") == sections


def aged(folder: Path, rule: str) -> Path:
    """A run folder as version 0.1 would have left it after step 7."""
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "statefeed": "0.1.0"}))
    recipe = folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace(f"feedback: {RULES[rule]}\n", f"feedback: {rule}\n"))
    for checkpoint in (folder / "checkpoints").glob("*.safetensors"):
        if checkpoint.name > "step-000000007.safetensors":
            checkpoint.unlink()
    return folder


@pytest.mark.parametrize("rule", ["bptt", "fused-bptt", "dsf@0.5/bptt", "dsf@0.5/fused-bptt"])
def test_a_run_under_an_exact_rule_is_resumed_bit_for_bit(rule: str, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ["--data.corpus=text", f"--data.path={text}", "--data.tokens=char", "--model.width=8", "--model.layers=1"]
    flags += ["--train.steps=12", "--train.batch=4", "--train.context=16", "--train.evaluations=3"]
    flags += ["--run.checkpoint_minutes=0", "--run.checkpoints=99", f"--run.dir={folder}"]
    assert cli.main(["train", *flags, f"--model.feedback={RULES[rule]}"]) == 0
    whole = metrics(folder)
    aged(folder, rule)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == whole
    assert json.loads((folder / "record.json").read_text())["continued"][0]["statefeed"] != "0.1.0"
    (result,) = read([folder]).results
    assert result.rule == RULES[rule]
    line = to_line(result)  # of a run that version 0.1 began, written by this one
    assert from_line(line).rule == RULES[rule]
    older = {**json.loads(line), "version": 2}
    older["config"]["model"]["feedback"] = rule
    assert from_line(json.dumps(older)).rule == RULES[rule]
    assert cli.main(["train", "--resume", f"--run.dir={folder}", *flags[:-1], f"--model.feedback={rule}"]) == 2


def test_an_old_rule_in_a_recipe_raises_with_the_new_name(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{corpus: text, path: {text}, tokens: char}}\nmodel: {{feedback: fused-bptt}}\n")
    assert cli.main(["train", str(recipe), f"--run.dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert "fused-bptt is now bptt" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_records_of_benchmarks_have_the_rules_of_today(tmp_path: Path) -> None:
    def line(version: str, implementation: str, variant: str) -> str:
        record = {"bench": "layers", "implementation": implementation, "variant": variant}
        return json.dumps({**record, "versions": {"statefeed": version}}) + "\n"

    found = [("torch.nn", "as shipped"), ("published", "dsf"), ("statefeed", "fused-bptt"), ("statefeed", "bptt")]
    lines = [line("0.1.0", *names) for names in found] + [line("0.2.0", "statefeed", "bptt")]
    (tmp_path / "layers.jsonl").write_text("".join(lines))
    variants = [record["variant"] for record in read([tmp_path]).benchmarks]
    assert variants == ["as shipped", "dsf", "bptt", "torch", "bptt"]
