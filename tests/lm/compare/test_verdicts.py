"""Verdicts over paired seeds: intervals in closed form, which runs are a pair, which rate counts, what is printed."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from statefeed.lm import cli, config
from statefeed.lm.compare import compare, figures, markdown_runs, rates, student, summary, verdict_tables
from statefeed.lm.compare.pairs import pair, program
from statefeed.lm.compare.results import Result, to_line
from statefeed.lm.compare.sources import Found, read
from statefeed.lm.compare.verdicts import DEFAULT_TERMS, Comparison, Difference, Terms, compare_rules
from statefeed.lm.config import Config, UsageError

CODE = {"statefeed": "0.2.0", "torch": "2.13", "commit": "a" * 40, "dirty": False}


def run(
    rule: str,
    seed: int,
    perplexities: Sequence[float],
    lr: float = 1e-3,
    outcome: str = "finished",
    test: float | None = None,
    steps: int = 100,
    **metadata: Any,
) -> Result:
    """A run of `steps` steps with one evaluation for every perplexity."""
    recipe = Config(
        model=config.Model(feedback=rule),
        train=config.Train(seed=seed, lr=lr, steps=steps, evaluations=len(perplexities) or 1),
    )
    return Result(
        config=dataclasses.asdict(recipe),
        metadata={"corpus": "made up", "parameters": 7, "threads": 1, "machine": "m", **CODE, **metadata},
        outcome=outcome,
        valid=[
            {"step": 10 * k, "epochs": k / 10, "seconds": 1.0 * k, "perplexity": perplexity}
            for k, perplexity in enumerate(perplexities, 1)
        ],
        alignment=[],
        ms={},
        tokens_per_s=None,
        peak_bytes=None,
        test=test,
    )


def runs(rule: str, perplexities: Sequence[float], **more: Any) -> list[Result]:
    """A run for every perplexity, with the seeds 1, 2, ..."""
    return [run(rule, seed, [value], **more) for seed, value in enumerate(perplexities, 1)]


def compared(results: Sequence[Result], terms: Terms = DEFAULT_TERMS) -> dict[str, Comparison]:
    found = compare_rules(results, terms, results)
    assert found is not None
    return {rule.name: rule for rule in found.comparisons}


def verdict(results: Sequence[Result], score: str = "best validation") -> str:
    return compared(results)["dsf"].differences[score].verdict()


# The interval --------------------------------------------------------------------------------------------------------


def test_quantiles_are_those_of_tables_and_of_scipy() -> None:
    # Abramowitz and Stegun, table 26.10, and Student's distribution with one degree of freedom in closed form.
    assert [round(student.quantile(0.95, n), 3) for n in (1, 2, 3, 4, 9, 29)] == [
        12.706,
        4.303,
        3.182,
        2.776,
        2.262,
        2.045,
    ]
    assert student.quantile(0.5, 1) == pytest.approx(1.0, rel=1e-14)
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 40), 99, 1000):
        for level in (0.5, 0.9, 0.95, 0.999):
            expected = stats.t.ppf((1 + level) / 2, freedom)
            assert student.quantile(level, freedom) == pytest.approx(expected, rel=1e-10), freedom


def test_the_interval_is_that_of_paired_logarithms() -> None:
    """Differences of the logarithms 0.01, 0.02 and 0.06: mean 0.03, deviation sqrt(0.0007), t 4.302653."""
    base = [100.0, 50.0, 200.0]
    logs = (0.01, 0.02, 0.06)
    found = compared(runs("bptt", base) + runs("dsf", [b * math.exp(d) for b, d in zip(base, logs, strict=True)]))
    difference = found["dsf"].differences["best validation"]
    reach = 4.302652729911275 * math.sqrt(0.0007) / math.sqrt(3)
    assert difference.mean == pytest.approx(0.03)
    assert difference.interval == pytest.approx((0.03 - reach, 0.03 + reach))
    assert difference.verdict() == "not decided"
    # Unpaired, the spread of the baseline alone is many times the differences.
    closer = [b * math.exp(0.03 + d) for b, d in zip(base, (-0.001, 0.0, 0.001), strict=True)]
    assert verdict(runs("bptt", base) + runs("dsf", closer)) == "worse"
    assert verdict(runs("bptt", closer) + runs("dsf", base)) == "better"


def test_it_agrees_with_the_paired_test_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    logs = (0.011, -0.02, 0.034, 0.05, 0.007)
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert Difference(logs).interval == pytest.approx((interval.low, interval.high))


def test_the_best_and_the_last_evaluation_and_the_test_split_have_their_own() -> None:
    bptt = [run("bptt", seed, [90, 100], test=100.0) for seed in (1, 2, 3)]
    dsf = [run("dsf", seed, [90, 110 + seed], test=80.0 + seed) for seed in (1, 2, 3)]
    found = compared(bptt + dsf)["dsf"].differences
    assert [found[name].verdict() for name in ("best validation", "last evaluation", "test")] == [
        "not decided",
        "worse",
        "better",
    ]
    without = [dataclasses.replace(one, test=None) for one in dsf[:1]] + dsf[1:]
    assert "test" not in compared(bptt + without)["dsf"].differences
    assert list(compared(runs("bptt", [9, 9, 9]) + runs("dsf", [9, 9, 9]))["dsf"].differences) == [
        "best validation",
        "last evaluation",
    ]


def test_ties_are_not_decided() -> None:
    tie = compared(runs("bptt", [50, 60, 70]) + runs("dsf", [50, 60, 70]))["dsf"].differences["best validation"]
    assert tie.interval == (0.0, 0.0)
    assert tie.verdict() == "not decided"
    assert tie.verdict(0.0) == "holds"


def test_fewer_than_three_pairs_have_no_verdict() -> None:
    for count in (1, 2):
        found = compared(runs("bptt", [50.0] * count) + runs("dsf", [90.0] * count))["dsf"]
        assert found.differences["best validation"].interval is None
        assert found.differences["best validation"].verdict() == "no verdict"
        assert found.differences["best validation"].verdict(0.05) == "no verdict"
    three = runs("bptt", [50.0, 50.1, 49.9]) + runs("dsf", [90.0, 90.0, 90.0])
    assert verdict(three) == "worse"


def test_a_claim_holds_where_the_whole_interval_is_within_the_limit() -> None:
    logs = tuple(math.log1p(percent / 100) for percent in (4.0, 4.1, 4.2))
    assert Difference(logs).verdict() == "worse"
    assert [Difference(logs).verdict(within) for within in (0.05, 0.042, 0.03, 0.0)] == [
        "holds",
        "not decided",
        "does not hold",
        "does not hold",
    ]


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_a_seed_without_a_partner_is_in_no_pair() -> None:
    """Seed 4 of the rule would turn the verdict; seed 5 has the baseline only."""
    results = runs("bptt", [50, 60, 70]) + runs("dsf", [51, 61.1, 71.3]) + [run("dsf", 4, [1.0]), run("bptt", 5, [9.0])]
    found = compared(results)["dsf"]
    assert len(found.pairs.runs) == 3
    assert found.pairs.omitted == ("seed 4: no run of the baseline", "seed 5: not run under the rule")
    assert verdict(results) == "worse"


def test_runs_of_another_commit_are_in_no_pair_and_two_programs_are_not_seeds_of_one() -> None:
    bptt = [*runs("bptt", [50, 60, 70]), run("bptt", 4, [80], commit="b" * 40)]
    dsf = [*runs("dsf", [51, 61.1, 71.3]), run("dsf", 4, [1.0], commit="b" * 40)]
    found = compared(bptt + dsf)["dsf"]
    assert [pairs[0].get("train.seed") for pairs in found.pairs.runs] == [1, 2, 3]
    assert found.pairs.omitted == ("seed 4: a pair of another commit than those counted",)
    dsf[1] = run("dsf", 2, [61.1], commit="b" * 40)
    found = compared(bptt + dsf)["dsf"]
    assert [pairs[0].get("train.seed") for pairs in found.pairs.runs] == [1, 3]
    assert "seed 2: the baseline's run is unfinished or of another commit" in found.pairs.omitted
    assert found.differences["best validation"].verdict() == "no verdict"


@pytest.mark.parametrize(
    "other",
    [
        {"statefeed": "0.1.0"},
        {"torch": "2.10"},
        {"dirty": True},
        {"continued": [{"step": 5, "commit": "b" * 40}]},
    ],
)
def test_what_makes_another_program(other: dict[str, Any]) -> None:
    assert program(run("dsf", 1, [50])) != program(run("dsf", 1, [50], **other))
    assert not pair(runs("dsf", [50], **other), runs("bptt", [50])).runs
    assert len(pair(runs("dsf", [50], **other), runs("bptt", [50], **other)).runs) == 1


def test_machine_and_threads_are_no_other_program() -> None:
    assert program(run("dsf", 1, [50])) == program(run("dsf", 1, [50], machine="another", threads=2))
    resumed = run("dsf", 1, [50], continued=[{"step": 5, "machine": "another"}])
    assert program(run("dsf", 1, [50])) == program(resumed)


def test_a_forward_pass_in_parallel_over_time_is_another_program() -> None:
    newton = run("dsf", 1, [50])
    newton.config["model"]["forward"] = "newton"
    assert not pair([newton], runs("bptt", [50])).runs


def test_a_record_without_a_commit_is_in_no_pair_and_an_installed_package_is_its_version() -> None:
    unknown = run("dsf", 1, [50])
    del unknown.metadata["commit"]
    assert pair([unknown], runs("bptt", [50])).omitted == ("seed 1: its record has no commit",)
    installed = {"commit": None, "dirty": None}
    assert len(pair(runs("dsf", [50], **installed), runs("bptt", [50], **installed)).runs) == 1


def test_the_old_name_of_a_rule_is_not_pooled_with_the_new_one(tmp_path: Path) -> None:
    """In version 0.1 "bptt" was torch's own layer."""
    lines = []
    for one in (*runs("bptt", [50, 60, 70], statefeed="0.1.0"), *runs("bptt", [40, 50, 60])):
        line = json.loads(to_line(one))
        lines.append(json.dumps({**line, "version": 2 if one.metadata["statefeed"] == "0.1.0" else 3}) + "\n")
    (tmp_path / "compare.jsonl").write_text("".join(lines))
    results = read([tmp_path]).results
    assert [one.rule for one in results] == ["torch"] * 3 + ["bptt"] * 3
    assert compared(results)["torch"].pairs.runs == ()


def test_an_unfinished_run_is_in_no_pair() -> None:
    results = runs("bptt", [50, 60, 70, 80]) + runs("dsf", [51, 61.1, 71.3])
    results.append(run("dsf", 4, [1000.0], outcome="unfinished"))
    assert compared(results)["dsf"].pairs.omitted == ("seed 4: unfinished",)
    assert verdict(results) == "worse"
    results[0] = dataclasses.replace(results[0], outcome="unfinished")
    assert verdict(results) == "no verdict"


def test_a_diverged_run_is_infinite_and_never_dropped() -> None:
    """Without it the rule would be better."""
    results = runs("bptt", [50, 60, 70, 80]) + runs("dsf", [40, 48.1, 56.2])
    assert verdict(results) == "better"
    results.append(run("dsf", 4, [90.0], outcome="diverged"))
    difference = compared(results)["dsf"].differences["best validation"]
    assert difference.mean == math.inf
    assert difference.interval is None
    assert difference.verdict() == "not decided"
    assert verdict_tables.describe(difference) == "1 diverged"
    nothing = run("dsf", 4, [], outcome="diverged")
    assert compared([*results[:-1], nothing])["dsf"].differences["best validation"].mean == math.inf


# Rates ---------------------------------------------------------------------------------------------------------------


def test_a_rate_is_chosen_on_shorter_runs_unless_the_runs_themselves_have_several() -> None:
    """The shorter runs say 0.001, at full length 0.002 is better."""
    grid = [run("dsf", 1, [p], lr=lr, steps=50) for lr, p in ((5e-4, 95), (1e-3, 90), (2e-3, 99))]
    full = runs("dsf", [60, 60], lr=1e-3)
    chosen = rates.choose(full, [*grid, *full])
    assert (chosen.chosen, chosen.steps, chosen.at_edge) == (1e-3, 50, False)
    assert chosen.describe() == "0.001 of 0.0005, 0.001, 0.002, chosen on runs of 50 steps"
    for other in (
        run("gate", 1, [1.0], lr=8e-3, steps=50),  # another rule
        run("dsf", 1, [1.0], lr=8e-3, steps=200),  # a longer run
        run("dsf", 1, [1.0], lr=8e-3, steps=50, outcome="unfinished"),
    ):
        assert rates.choose(full, [*grid, *full, other]) == chosen
    one = run("dsf", 1, [1.0], lr=8e-3, steps=50, outcome="unfinished")
    two = run("dsf", 1, [1.0], lr=8e-3, steps=60)  # a single rate is no grid
    assert rates.choose(full, [*grid, *full, two]) == chosen
    assert rates.choose(full, [one, two]).describe() == "0.001, the only one"
    both = [*full, *runs("dsf", [50, 50], lr=2e-3)]
    alone = rates.choose(both, [*grid, *both])
    assert (alone.chosen, alone.steps, alone.at_edge) == (2e-3, None, True)
    assert alone.describe() == "0.002 of 0.001, 0.002, chosen on these runs, AT THE EDGE"


def test_a_grid_whose_best_rate_was_not_run_says_so() -> None:
    grid = [run("dsf", 1, [p], lr=lr, steps=50) for lr, p in ((1e-3, 90), (2e-3, 80))]
    chosen = rates.choose(runs("dsf", [60]), grid)
    assert chosen.chosen == 1e-3
    assert (
        chosen.describe()
        == "0.001 of 0.001, 0.002, chosen on runs of 50 steps, BUT 0.002 IS BEST THERE and was not run"
    )


def test_a_rate_at_which_a_run_diverged_is_not_chosen_and_ends_the_grid() -> None:
    diverged = run("dsf", 2, [], lr=4e-3, outcome="diverged")
    full = [*runs("dsf", [60, 60], lr=1e-3), *runs("dsf", [50, 50], lr=2e-3), run("dsf", 1, [10], lr=4e-3), diverged]
    chosen = rates.choose(full)
    assert (chosen.chosen, chosen.at_edge) == (2e-3, False)
    grid = [run("dsf", 1, [p], lr=lr, steps=50) for lr, p in ((1e-3, 90), (2e-3, 80))]
    grid.append(run("dsf", 1, [], lr=4e-3, outcome="diverged", steps=50))
    assert not rates.choose(runs("dsf", [60], lr=2e-3), grid).at_edge


def test_rates_are_compared_over_the_same_seeds() -> None:
    """Seed 3 is hard, and was run at one rate only."""
    full = [*runs("dsf", [50, 60, 200], lr=1e-3), *runs("dsf", [55, 65], lr=2e-3)]
    assert rates.choose(full).chosen == 1e-3


def test_all_seeds_decide_between_good_rates_beside_a_bad_one_with_a_single_seed() -> None:
    full = [*runs("dsf", [51, 60, 60], lr=1e-3), *runs("dsf", [50, 70, 70], lr=2e-3), run("dsf", 1, [90], lr=4e-3)]
    assert rates.choose(full).chosen == 1e-3
    diverged = [*full, run("dsf", 4, [], lr=1e-3, outcome="diverged")]
    assert rates.choose(diverged).chosen == 2e-3


def test_every_rule_is_compared_at_its_own_rate() -> None:
    bptt = [*runs("bptt", [50, 60, 70], lr=1e-3), *runs("bptt", [70, 80, 90], lr=2e-3)]
    dsf = [*runs("dsf", [90, 90, 90], lr=1e-3), *runs("dsf", [49, 58.8, 68.5], lr=2e-3)]
    assert verdict(bptt + dsf) == "better"
    found = compared(bptt + dsf)["dsf"]
    assert {(a.get("train.lr"), b.get("train.lr")) for a, b in found.pairs.runs} == {(2e-3, 1e-3)}


# What is printed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def results() -> list[Result]:
    return [
        *runs("bptt", [50, 60, 70], test=50.0),
        *runs("dsf@0.3/calibrated@0.6/log_spaced(64)", [51, 61.1, 71.3], test=60.0),
        *runs("gate", [50, 60], test=50.0),
    ]


def test_the_table_fits_80_columns_and_says_what_was_left_out(
    results: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "compare.jsonl").write_text("".join(map(to_line, results)))
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    text = "".join(row[0] for row in rows[:3])
    assert text.startswith("dsf@0.3/calibrated@0.6")
    assert rows[0][1:] == ["best", "3", "+1.9% (+1.7 to +2.1)", "worse"]
    assert ["gate", "best", "2", "+0.00%", "no verdict"] in rows
    flat = " ".join(out.split())
    assert "Without a pair, gate: seed 3: not run under the rule." in flat
    assert "Rate of bptt, " in flat
    assert "3 intervals of 95% each, not corrected for their number: about one in 20 misses the truth." in flat


def test_a_comparison_prints_its_verdicts_and_draws_them(
    results: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.show(results, tmp_path)
    out = capsys.readouterr().out
    assert "difference to bptt: 95% interval over seeds" in out
    assert re.search(r"best +│ +3 │ +\+1\.9% \(\+1\.7 to \+2\.1\) │ worse", out)
    assert any(path.stem.endswith("-difference") for path in tmp_path.glob("*.svg"))
    compare.show(results, tmp_path, Terms("gate"), wide=True)
    assert "difference to gate" not in capsys.readouterr().out  # two pairs


def test_another_baseline_and_a_claim(
    results: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compare.jsonl").write_text("".join(map(to_line, results)))
    arguments = ["report", str(tmp_path), "-o", str(tmp_path / "r.html")]
    assert cli.main([*arguments, "--baseline=dsf@0.30/calibrated@0.6/log_spaced(64)"]) == 0
    assert re.search(r"│ bptt +│ best .*│ better +│", capsys.readouterr().out)
    assert cli.main([*arguments, "--within=5"]) == 0
    out = capsys.readouterr().out
    assert "difference to bptt, at most 5% above it: 95% interval over seeds" in out
    assert re.search(r"best +│ +3 │ .*│ holds +│", out)
    assert cli.main([*arguments, "--baseline=dfs"]) == 2
    assert capsys.readouterr().err.startswith("statefeed: --baseline dfs: feedback must be")
    assert cli.main([*arguments, "--within=-1"]) == 2
    assert "--within must be a number of percent from 0 to 1,000, got -1" in capsys.readouterr().err


def test_one_seed_is_no_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare.jsonl").write_text("".join(map(to_line, runs("bptt", [50]) + runs("dsf", [60]))))
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "made up, gru 2x256 plain, 100 steps: no verdict, fewer than 3 pairs of runs with one seed and program" in out
    )
    assert "worse" not in out
    assert "worse" not in (tmp_path / "r.html").read_text()


def test_without_the_baseline_nothing_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_rules(runs("dsf", [50] * 3) + runs("gate", [50] * 3), Terms()) is None
    assert compare_rules(runs("bptt", [50] * 3), Terms()) is None
    compare.show(runs("dsf", [50] * 3) + runs("gate", [50] * 3), tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "no verdict without runs of the baseline bptt: name one of dsf, gate with --baseline" in out


def test_the_page_the_documents_and_the_figure_say_the_same(results: list[Result], tmp_path: Path) -> None:
    from statefeed.lm.compare.page import page

    (row,) = [rule for name, rule in compared(results).items() if name.startswith("dsf")]
    difference = row.differences["best validation"]
    words = f"{verdict_tables.describe(difference)}: {difference.verdict()}"
    assert words.endswith(": worse")
    assert words in page(Found(results), Terms())
    text = markdown_runs.verdicts(Found(results), Terms())
    assert words in text
    assert "| `bptt` | 0.001 |  | 60.0 |  |  |  |" in text
    target = tmp_path / "README.md"
    target.write_text(f"before\n{summary.VERDICTS}old{summary.END}after\n")
    (tmp_path / "compare.jsonl").write_text("".join(map(to_line, results)))
    assert cli.main(["report", str(tmp_path / "compare.jsonl"), f"--verdicts={target}"]) == 0
    assert target.read_text() == f"before\n{summary.VERDICTS}\n{text}{summary.END}after\n"
    target.write_text("no marks\n")
    with pytest.raises(UsageError, match="--verdicts must name a file with the lines"):
        summary.update_verdicts(target, Found(results), Terms())
    (drawn,) = [figure for title, figure in figures.draw(results).items() if title.endswith(": difference")]
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dsf@0.3/calibrated@0.6/log_spaced(64)", "gate"]
    assert "m, 1 thread" in drawn.get_suptitle()
    bars = axes.containers[0].lines[2][0].get_segments()[0][:, 0].tolist()
    assert difference.interval is not None
    assert bars == pytest.approx([100 * math.expm1(end) for end in difference.interval])
    assert len({line.get_marker() for line in (c.lines[0] for c in axes.containers)}) == 2
