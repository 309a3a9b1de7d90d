"""A run folder and a comparison made before keys were renamed (commit 634e57b): resumed, scored, sampled, reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, metrics

from statefeed.lm import cli, migration
from statefeed.lm.compare.results import to_line
from statefeed.lm.compare.sources import read
from statefeed.lm.config import Train

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
    assert [result.rule for result in results] == ["bptt", "dsf", "ft-bptt"]
    assert [result.get("train.state_reset_prob") for result in results] == [0.05] * 3
    assert all(set(result.ms) == {"data", "forward", "backward", "optimizer"} for result in results)
    (tmp_path / "compare.jsonl").write_text("".join(map(to_line, results)))
    assert read([tmp_path]).results == results
    written = (tmp_path / "compare.jsonl").read_text()
    assert written.count('"version": 2') == 3
    assert not any(f'"{key}"' in written for key in ("facts", "restart", "optimiser"))
    assert cli.main(["report", str(COMPARISON), str(tmp_path), "-o", str(tmp_path / "report.html")]) == 0


def test_keys_of_today_stay_as_they_are() -> None:
    recipe = {"train": {"state_reset_prob": 0.5, "optimizer": "adam"}}
    assert migration.recipe(recipe) == recipe
    assert migration.metrics_row({"optimizer_ms": 1.0}) == {"optimizer_ms": 1.0}
    assert migration.log_state({}) == {}
    assert hasattr(Train(), "state_reset_prob")
