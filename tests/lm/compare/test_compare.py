"""statefeed compare: the same training under every rule, run folders as of `statefeed train`, numbers that hold."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from statefeed.lm import cli, config, identity
from statefeed.lm import recipe as recipes
from statefeed.lm.compare import compare, figures
from statefeed.lm.compare.plan import plan
from statefeed.lm.compare.results import Result, from_line, to_line
from statefeed.lm.compare.run_result import read_run
from statefeed.lm.compare.sources import read
from statefeed.lm.compare.table import table
from statefeed.lm.compare.tasks import tasks
from statefeed.lm.config import Config, UsageError
from statefeed.lm.run import metadata as run_metadata
from statefeed.lm.run.distributed import Group
from statefeed.lm.run.setup import prepare

TIMES = ("seconds", "tokens_per_s", "peak_bytes", "data_ms", "forward_ms", "backward_ms", "optimizer_ms")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(folder)]


@pytest.fixture(scope="module")
def compared(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two rules, one run of each."""
    folder = tmp_path_factory.mktemp("compared") / "rules"
    arguments = ["compare", *flags, "--feedback=bptt,dsf", "--lr=dsf=2e-3", f"--out={folder}"]
    assert cli.main(arguments) == 0
    return folder


# What it trains ------------------------------------------------------------------------------------------------------


def test_train_creates_a_run_folder(compared: Path, flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    more = ["--model.feedback=dsf", "--train.lr=2e-3", "--train.alignment=true", f"--run.dir={folder}"]
    assert cli.main(["train", *flags, *more]) == 0
    assert without_times(folder) == without_times(compared / "dsf-seed1")
    assert {path.name for path in folder.iterdir()} == {path.name for path in (compared / "dsf-seed1").iterdir()}


def test_alignment_is_logged_at_every_evaluation_of_a_rule_that_is_not_exact(compared: Path) -> None:
    assert [row["step"] for row in rows(compared / "dsf-seed1") if row["split"] == "alignment"] == [4, 8, 12]
    assert [row for row in rows(compared / "bptt-seed1") if row["split"] == "alignment"] == []
    for row in rows(compared / "dsf-seed1"):
        if row["split"] == "alignment":
            assert 0 < row["cosine"] < 1
            assert row["norm_ratio"] > 0
            assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))


def test_everything_is_the_same_but_the_rule(compared: Path) -> None:
    exact, approximate = (rows(compared / f"{rule}-seed1") for rule in ("bptt", "dsf"))
    assert exact[0]["loss"] == pytest.approx(approximate[0]["loss"], rel=1e-5)
    assert [row["step"] for row in exact if row["split"] == "valid"] == [
        row["step"] for row in approximate if row["split"] == "valid"
    ]


def test_planned_runs_differ_in_rule_rate_and_seed_only(flags: list[str], tmp_path: Path) -> None:
    recipe = recipes.build(recipes.parse(recipes.parser("test"), flags))
    planned = plan(recipe, "bptt,dsf,dsf@0.3/gate+1", 2, "bptt=1e-3,dsf@0.3/gate+1=0.5", tmp_path)
    assert [(p.train.seed, p.model.feedback, p.train.lr) for p in planned] == [
        (1, "bptt", 1e-3),
        (1, "dsf", recipe.train.lr),
        (1, "dsf@0.3/gate+1", 0.5),
        (2, "bptt", 1e-3),
        (2, "dsf", recipe.train.lr),
        (2, "dsf@0.3/gate+1", 0.5),
    ]
    assert len({p.run.dir for p in planned}) == 6
    assert {Path(p.run.dir).parent for p in planned} == {tmp_path}
    first, second, *_ = (prepare(p, False, Group()) for p in planned[:2])
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])
    for a, b in zip(first.source.epoch(0), second.source.epoch(0), strict=True):
        assert torch.equal(a.inputs, b.inputs)


# What it keeps and prints --------------------------------------------------------------------------------------------


def test_records_and_figures(compared: Path) -> None:
    found = [from_line(line) for line in (compared / "compare.jsonl").read_text().splitlines()]
    assert [(r.rule, r.outcome, r.get("train.lr")) for r in found] == [
        ("bptt", "finished", 3e-3),
        ("dsf", "finished", 2e-3),
    ]
    valid = [row["perplexity"] for row in rows(compared / "dsf-seed1") if row["split"] == "valid"]
    assert found[1].best == min(valid)
    assert [row["perplexity"] for row in found[1].valid] == valid
    assert found[1].test == next(row["perplexity"] for row in rows(compared / "dsf-seed1") if row["split"] == "test")
    forms = {"perplexity-against-epoch", "alignment-with-bptt"}  # no time: the runs were not timed in turns
    drawn = {path.stem for path in compared.glob("*.svg")}
    assert all(any(name.endswith(form) for name in drawn) for form in forms)


def test_finished_runs_are_not_trained_again(
    compared: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(recipe: Config) -> tuple[str, None]:
        raise AssertionError(f"trained {recipe.run.dir}")

    monkeypatch.setattr(compare, "train_in_subprocess", trained)
    before = (compared / "compare.jsonl").read_text()
    assert cli.main(["compare", *flags, "--feedback=dsf,bptt", "--lr=dsf=2e-3", f"--out={compared}"]) == 0
    out = capsys.readouterr().out
    assert "valid perplexity (seeds)" in out
    assert "epochs to bptt" not in out
    assert all(len(line) <= 80 for line in out.splitlines() if line[:1] in "┏┃┡│└")
    assert cli.main(["compare", *flags, "--feedback=dsf,bptt", "--lr=dsf=2e-3", f"--out={compared}", "--wide"]) == 0
    assert "epochs to bptt" in capsys.readouterr().out
    assert (compared / "compare.jsonl").read_text() == before


def test_a_folder_of_another_recipe_raises(
    compared: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *flags, "--feedback=dsf", f"--out={compared}"]) == 2
    err = capsys.readouterr().err
    assert "with train.lr 0.002 and not 0.003: choose another folder with --out" in err
    assert err.count("\n") == 1


def test_a_comparison_that_was_moved_has_its_runs(
    compared: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_in_subprocess", lambda recipe: pytest.fail(f"trained {recipe.run.dir}"))
    folder = tmp_path / "moved"
    shutil.copytree(compared, folder)
    assert cli.main(["compare", *flags, "--feedback=dsf,bptt", "--lr=dsf=2e-3", f"--out={folder}"]) == 0
    assert (folder / "compare.jsonl").read_text() == (compared / "compare.jsonl").read_text()
    assert len(read([compared, folder, compared / "dsf-seed1", folder / "dsf-seed1"]).results) == 2


def test_records_that_are_empty_are_none(compared: Path, flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(compared, folder)
    (folder / "compare.jsonl").write_text("")
    assert cli.main(["compare", *flags, "--feedback=dsf,bptt", "--lr=dsf=2e-3", f"--out={folder}"]) == 0
    assert len((folder / "compare.jsonl").read_text().splitlines()) == 2


def test_a_record_is_added_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "compare.jsonl"
    compare.add_record("first\n", records)

    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            compare.add_record("second\n", records)
        assert records.read_text() == "first\n"
    compare.add_record("second\n", records)
    assert records.read_text() == "first\nsecond\n"
    assert list(tmp_path.iterdir()) == [records]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_a_run_has_begun_is_an_interruption(
    number: int, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "statefeed.py"
    fake.write_text(f"import os, signal, time\nos.kill(os.getppid(), {int(number)})\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    assert cli.main(["compare", *flags, "--feedback=dsf", f"--out={folder}"]) == 128 + number
    assert capfd.readouterr().err == (
        f"statefeed: the comparison was interrupted in {folder / 'dsf-seed1'}: the same command resumes it\n"
    )


def test_a_signal_that_a_run_ignored_stops_the_comparison_after_it(
    run: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends as if nothing had been, as where the signal comes behind its last step."""
    fake = tmp_path / "statefeed.py"
    fake.write_text(
        "import os, shutil, signal, sys, time\n"
        "heard = []\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "while not heard: time.sleep(0.01)\n"
        "(folder,) = (word.split('=', 1)[1] for word in sys.argv if word.startswith('--run.dir='))\n"
        f"shutil.copytree({str(run)!r}, folder)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    assert cli.main(["compare", *flags, "--feedback=dsf,bptt", f"--out={folder}"]) == 130
    behind = folder / "dsf-seed1"
    sentence = f"the comparison was interrupted after {behind}: the same command resumes it"
    assert capfd.readouterr().err == f"statefeed: {sentence}\n"
    assert [path.name for path in sorted(folder.iterdir())] == ["compare.jsonl", "dsf-seed1"]
    assert [found.outcome for found in read([folder]).results] == ["finished"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--train.batch=99999", "--out={folder}"], "tokens, fewer than the "),
        (["--out={text}"], "must be another folder than the text of data.path"),
        (["--out=/proc/none"], "/proc/none"),
    ],
)
def test_a_user_error_found_during_the_run_prints_one_sentence(
    more: list[str], sentence: str, flags: list[str], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [word.format(folder=tmp_path / "out", text=text) for word in more]
    assert cli.main(["compare", *flags, "--feedback=dsf,bptt", *arguments]) == 2
    err = capfd.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", ["sys.exit(2)", "raise ValueError", "os.kill(os.getpid(), 9)"])
def test_a_run_that_fails_stops_the_comparison(
    code: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "statefeed.py"
    fake.write_text(f"import os, sys\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recipe = recipes.build(recipes.parse(recipes.parser("test"), [*flags, f"--run.dir={tmp_path / 'run'}"]))
    with pytest.raises(UsageError, match=r"whose training ended with exit code -?[129]: the same command resumes it"):
        compare.train_in_subprocess(recipe)


def test_a_rule_that_diverges_is_a_result_and_the_others_continue(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(recipe: Config) -> tuple[str, None]:
        given = identity.flat(dataclasses.asdict(recipe))
        arguments = [f"--{key}={'null' if value is None else value}" for key, value in given.items()]
        return "diverged" if cli.main(["train", *arguments]) else "finished", None

    monkeypatch.setattr(compare, "train_in_subprocess", in_this_process)
    wild = [
        "--train.clip=null",
        "--train.warmup=0",
        "--feedback=dsf,bptt",
        "--lr=dsf=1e30",
        f"--out={tmp_path / 'out'}",
    ]
    assert cli.main(["compare", *flags, *wild]) == 0
    found = [from_line(line) for line in (tmp_path / "out" / "compare.jsonl").read_text().splitlines()]
    assert [(r.rule, r.outcome, r.best is None) for r in found] == [
        ("dsf", "diverged", True),
        ("bptt", "finished", False),
    ]
    assert "1, 1 diverged" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_an_interrupted_comparison_is_resumed(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    arguments = [*flags, "--train.steps=200", "--train.evaluations=1", "--feedback=0.5", f"--out={folder}"]
    command = [sys.executable, "-m", "statefeed", "compare", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        metrics = folder / "0.5-seed1" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 130
    assert "the same command resumes it" in err
    assert not (folder / "compare.jsonl").exists()
    assert cli.main(["compare", *arguments]) == 0
    (result,) = (from_line(line) for line in (folder / "compare.jsonl").read_text().splitlines())
    assert result.outcome == "finished"
    train = [row["step"] for row in rows(folder / "0.5-seed1") if row["split"] == "train"]
    assert train == list(range(1, 201))
    assert "resuming after step " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--feedback=dsf,fast"], "--feedback fast: feedback must be"),
        (["--feedback=dsf,,bptt"], "--feedback must have a rule between its commas, got 'dsf,,bptt'"),
        (["--feedback=gate", "--model.cell=rnn"], "--feedback gate: "),
        (["--feedback=dsf@2/bptt"], "--feedback dsf@2/bptt: "),
        (["--feedback=dsf", "--seeds=0"], "--seeds must be between 1 and 1,000, got 0"),
        (["--feedback=dsf", "--lr=bptt=1e-3"], "--lr must name rules of --feedback (dsf), got bptt=1e-3"),
        (["--feedback=dsf", "--lr=dsf=fast"], "--lr must be rule=rate"),
        (["--feedback=dsf", "--lr=dsf=1,dsf=2"], "--lr must name a rule once, got dsf=1,dsf=2"),
        (["--feedback=dsf", "--lr=dsf=-1"], "train.lr must be a positive number"),
        (
            ["--feedback=dsf", "--model.feedback=dsf"],
            "statefeed compare takes --feedback and --out, got --model.feedback",
        ),
        (["--feedback=dsf", "--baseline=dfs"], "--baseline dfs: feedback must be"),
        (["--feedback=dsf", "--within=-1"], "--within must be a number of percent from 0 to 1,000, got -1"),
        (["--feedback=dsf", "--run.dir=x"], "statefeed compare takes --feedback and --out, got --run.dir"),
        (["--feedback=dsf", "--train.learning=1"], "unknown key train.learning"),
        (["nowhere.yaml", "--feedback=dsf"], "the recipe nowhere.yaml does not exist"),
        ([], "feedback"),
    ],
)
def test_a_user_error_prints_one_sentence_and_creates_no_file(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# The arithmetic ------------------------------------------------------------------------------------------------------


def result(
    rule: str,
    seed: int,
    perplexities: Sequence[float],
    step_seconds: float = 1.0,
    outcome: str = "finished",
    **ms: float,
) -> Result:
    """A run with an evaluation every ten steps, an epoch having twenty."""
    recipe = Config(model=config.Model(feedback=rule), train=config.Train(seed=seed))
    return Result(
        config=dataclasses.asdict(recipe),
        metadata={"corpus": "made up", "parameters": 7, "torch": "2", "threads": 1, "machine": "m"},
        outcome=outcome,
        valid=[
            {
                "step": 10 * (k + 1),
                "epochs": (k + 1) / 2,
                "seconds": 10 * (k + 1) * step_seconds,
                "perplexity": perplexity,
            }
            for k, perplexity in enumerate(perplexities)
        ],
        alignment=[] if rule == "bptt" else [{"step": 10, "epochs": 0.5, "cosine": 0.5, "norm_ratio": 2.0}],
        ms=ms,
        tokens_per_s=100.0,
        peak_bytes=2.0**20 * 100,
        test=None,
    )


def test_the_table_counts_seed_by_seed() -> None:
    compared = [
        result("ft-bptt", 1, [90, 60, 50]),
        result("dsf", 1, [80, 55, 45, 44], 0.5, data=1.0, forward=10.0, backward=20.0, optimizer=5.0),
        result("bptt", 1, [95, 50, 40]),
        result("ft-bptt", 2, [91, 61, 70]),
        result("dsf", 2, [75, 50, 38, 39], 0.5, data=1.0, forward=12.0, backward=22.0, optimizer=5.0),
        result("bptt", 2, [96, 51, 39]),
    ]
    headings, rules = table(compared)
    cells = {row[0]: dict(zip(headings, row, strict=True)) for row in rules}
    dsf = cells["dsf"]
    # Best of the seeds 44 and 38: mean 41, standard deviation 6 / sqrt(2).
    assert dsf["valid perplexity"] == "41.00 ± 4.24"
    assert (dsf["forward ms"], dsf["backward ms"], dsf["step ms"]) == ("11.0", "21.0", "38.0")
    assert (dsf["tokens/s"], dsf["peak MiB"]) == ("100", "100")
    # ft-bptt ends with 50 and 70: reached at the evaluations 3 and 2, after 1.5 and 1 epochs, 15 and 10 seconds.
    assert (dsf["epochs to ft-bptt"], dsf["seconds to ft-bptt"]) == ("1.2", "12.5")
    # bptt ends with 40 and 39: never with the first seed, at the third evaluation with the second.
    assert (dsf["epochs to bptt"], dsf["seconds to bptt"]) == ("1.5 (1 of 2)", "15.0 (1 of 2)")
    assert (dsf["cosine with BPTT"], dsf["norm ratio"]) == ("0.500 (2 of 8)", "2.000 (2 of 8)")
    assert (cells["bptt"]["cosine with BPTT"], cells["bptt"]["forward ms"]) == ("-", "-")
    assert cells["ft-bptt"]["epochs to bptt"] == "never"
    assert cells["ft-bptt"]["valid perplexity"] == "55.50 ± 7.78"
    assert cells["bptt"]["epochs to bptt"] == "1.5"


def test_diverged_and_unfinished_seeds_are_left_out() -> None:
    whole = [result("dsf", seed, [80, 60, 50]) for seed in (1, 2)]
    odd = [result("dsf", 3, [1e6], outcome="diverged"), result("dsf", 4, [70], outcome="unfinished")]
    headings, ((*row,),) = table([*whole, *odd])
    cells = dict(zip(headings, row, strict=True))
    assert (cells["seeds"], cells["valid perplexity"]) == ("4, 1 diverged, 1 unfinished", "50.00 ± 0.00")
    drawn = figures.plot_vs_epochs([*whole, *odd])
    assert drawn is not None
    assert [len(line.get_xdata()) for line in drawn.axes[0].lines] == [3]
    headings, ((*row,),) = table(odd)  # nothing else is there yet
    assert dict(zip(headings, row, strict=True))["valid perplexity"] == "70.00"


def test_exact_stages_of_a_schedule_have_no_alignment() -> None:
    headings, ((*row,),) = table([result("dsf@0.3/bptt", 1, [90, 60, 50])])
    assert dict(zip(headings, row, strict=True))["cosine with BPTT"] == "0.500 (1 of 3)"


def test_a_rule_is_one_however_it_is_spelled(flags: list[str], tmp_path: Path) -> None:
    assert [result(rule, 1, [50]).rule for rule in ("0.0", "ramp(1)", "dsf+0", "bptt")] == [
        "ft-bptt",
        "dsf",
        "dsf",
        "bptt",
    ]
    recipe = recipes.build(recipes.parse(recipes.parser("test"), flags))
    with pytest.raises(UsageError, match=r"--feedback must name a rule once, got 0\.5 and 0\.50, which are the same"):
        plan(recipe, "bptt,0.5,0.50", 1, "", tmp_path)


def test_a_run_that_diverged_has_no_score_and_sets_no_target() -> None:
    compared = [result("bptt", 1, [50, 1e9], outcome="diverged"), result("dsf", 1, [60])]
    headings, rules = table(compared)
    bptt, dsf = (dict(zip(headings, row, strict=True)) for row in rules)
    assert (bptt["seeds"], bptt["valid perplexity"]) == ("1, 1 diverged", "-")
    assert dsf["epochs to bptt"] == "-"


def test_records_older_than_a_key_are_those_of_its_default() -> None:
    new = result("dsf", 1, [50])
    line = json.loads(to_line(new))
    del line["config"]["train"]["device"], line["config"]["train"]["precision"]
    old = from_line(json.dumps(line))
    assert old == new
    assert len(tasks([old, result("bptt", 1, [40])])) == 1


def test_runs_of_different_devices_are_not_mixed() -> None:
    one, other = result("dsf", 1, [50]), result("bptt", 1, [40])
    other.metadata["device"] = "a GPU"
    assert [title.partition("device=")[2] for title in tasks([one, other])] == ["cpu", "a GPU"]


def test_runs_of_different_recipes_are_not_mixed() -> None:
    one, other = result("dsf", 1, [50]), result("bptt", 1, [40])
    other.config["train"]["batch"] = 7
    found = tasks([one, other, result("bptt", 2, [41])])
    assert [[r.rule for r in same] for same in found.values()] == [["dsf", "bptt"], ["bptt"]]
    assert [title.partition("train.batch=")[2] for title in found] == ["32", "7"]


def test_a_text_is_identified_by_what_was_read() -> None:
    def of(text: str, path: str, seed: int) -> Result:
        found = result("dsf", seed, [50])
        found.config["data"]["path"] = path
        return dataclasses.replace(found, metadata={**found.metadata, "splits": {"train": {"sha256": text}}})

    compared = [of("a" * 64, "data/ptb", 1), of("a" * 64, "/mnt/ptb", 2), of("b" * 64, "data/ptb", 3)]
    found = tasks(compared)
    assert [[run.get("train.seed") for run in same] for same in found.values()] == [[1, 2], [3]]
    assert [title.partition("text=")[2] for title in found] == ["a" * 8, "b" * 8]


def test_a_key_that_only_some_records_have_loses_none() -> None:
    one, other = result("dsf", 1, [50]), result("dsf", 2, [40])
    other.config["train"]["forgotten"] = 7
    for compared in ([one, other], [other, one]):
        assert sorted(len(same) for same in tasks(compared).values()) == [1, 1]


def test_cells_are_compared_with_their_equals() -> None:
    def of(cell: str, block: str, rate: float, perplexity: float) -> Result:
        found = result("dsf", 1, [perplexity])
        found.config["model"] |= {"cell": cell, "block": block}
        found.config["train"]["lr"] = rate
        return found

    gru = [of("gru", "plain", 1e-3, 60), of("gru", "plain", 2e-3, 50), of("gru", "prenorm", 1e-3, 30)]
    (drawn,) = figures.by_cell([*gru, of("lstm", "plain", 1e-3, 40)]).values()
    (points,) = drawn.axes[0].containers
    assert points.lines[0].get_xydata().tolist() == [[0, 50], [1, 40]]  # the better rate, one block
    assert figures.by_cell([*gru, of("lstm", "stacked", 1e-3, 40)]) == {}


@pytest.mark.parametrize(("parameters", "beside"), [(96, True), (105, True), (95, False), (106, False), (0, False)])
def test_a_model_without_recurrent_cells_is_compared_with_those_of_its_size(parameters: int, beside: bool) -> None:
    gru, s4d = result("dsf", 1, [50]), result("bptt", 1, [40])
    gru.metadata["parameters"], s4d.metadata["parameters"] = 100, parameters
    s4d.config["model"]["cell"] = "s4d"
    assert bool(figures.by_cell([gru, s4d])) == beside


def test_a_rule_at_two_rates_is_two_rows() -> None:
    one, other = result("dsf", 1, [50]), result("dsf", 1, [40])
    other.config["train"]["lr"] = 0.5
    headings, rules = table([one, other])
    assert headings[:3] == ["rule", "valid perplexity", "rate"]
    assert [row[:3] for row in rules] == [["dsf at 0.003", "50.00", "0.003"], ["dsf at 0.5", "40.00", "0.5"]]


@pytest.mark.parametrize("exact", ["bptt", "torch"])
def test_a_rival_at_two_rates_sets_its_target_at_the_better_one(exact: str) -> None:
    better, worse = result(exact, 1, [60, 40]), result(exact, 1, [90, 70])
    worse.config["train"]["lr"] = 0.5
    headings, rules = table([better, worse, result("dsf", 1, [70, 50, 40])])
    assert [dict(zip(headings, row, strict=True))[f"epochs to {exact}"] for row in rules] == ["1.0", "never", "1.5"]


def test_the_step_of_a_schedule_is_that_of_its_rules(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    recipe = (folder / "config.yaml").read_text()
    before = recipes.load(folder / "config.yaml").model.feedback
    (folder / "config.yaml").write_text(recipe.replace(f"feedback: {before}", "feedback: dsf@0.6/bptt"))
    lines = [
        {"step": step, "epoch": 1, "split": "train", "tokens_per_s": 1.0, "seconds": 1.0}
        | {f"{phase}_ms": 1.0 if step <= 7 else 10.0 for phase in ("data", "forward", "backward", "optimizer")}
        for step in range(1, 13)  # 60% of 12 steps are 7.2: the eighth is the first of the second rule but one
    ]
    for row in lines:
        if row["step"] == 8:
            row["forward_ms"] = 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(folder)
    assert found.ms["forward"] == pytest.approx((8 * 1.0 + 4 * 10.0) / 12)


def test_how_a_run_ended_is_read_from_its_folder(run: Path, tmp_path: Path) -> None:
    assert read_run(run).outcome == "finished"
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    recipe = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(recipe.replace("evaluations: ", "evaluations: 9"))  # more than steps
    assert read_run(folder).outcome == "finished"
    run_metadata.update(folder, diverged="training diverged")
    assert (read_run(folder).outcome, read_run(folder).best) == ("diverged", None)


def test_seconds_are_those_of_training_where_steps_are_timed(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "record.json"):
        (folder / name).write_text((run / name).read_text())
    metadata = json.loads((folder / "record.json").read_text())
    phases = {"data_ms": 1.0, "forward_ms": 2.0, "backward_ms": 3.0, "optimizer_ms": 4.0}
    lines: list[dict[str, Any]] = []
    for step, scale in ((5, 100), (10, 300)):  # a second a step, then three
        timed = {phase: scale * ms for phase, ms in phases.items()}
        lines.append({"step": step, "epoch": 1, "split": "train", "tokens_per_s": 1.0, "seconds": 1e6, **timed})
        lines[-1]["peak_bytes"] = scale
        lines.append({"step": step - 1, "epoch": 1, "split": "valid", "perplexity": 9.0, "seconds": 1e6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(folder)
    assert [row["seconds"] for row in found.valid] == pytest.approx([4.0, 5.0 + 4 * 3.0])
    assert [row["epochs"] for row in found.valid] == [4 / metadata["steps_per_epoch"], 9 / metadata["steps_per_epoch"]]
    assert found.ms == {"data": 200.0, "forward": 400.0, "backward": 600.0, "optimizer": 800.0}
    assert found.step_ms == 2000.0
    assert found.outcome == "unfinished"


def test_the_peak_is_that_of_the_steps_before_the_first_evaluation(run: Path, tmp_path: Path) -> None:
    """Under every rule, whether or not its evaluations run exact BPTT besides."""
    shutil.copytree(run, tmp_path / "run")
    lines = [
        {"step": step, "epoch": 1, "split": split, "seconds": 1.0, "peak_bytes": peak, **more}
        for step, split, peak, more in (
            (1, "train", 100, {"tokens_per_s": 1.0}),
            (2, "train", 200, {"tokens_per_s": 1.0}),
            (2, "valid", 300, {"perplexity": 9.0}),
            (2, "alignment", 500, {"cosine": 0.5, "norm_ratio": 1.0}),
            (3, "train", 500, {"tokens_per_s": 1.0}),
        )
    ]
    for split in ("alignment", None):  # with and without
        kept = [line for line in lines if line["split"] != split]
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        assert read_run(tmp_path / "run").peak_bytes == 200


def test_a_folder_without_a_run_raises(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        read_run(tmp_path)


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_printed_table_fits_80_columns_whatever_the_rules_are_called(
    columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    long = "dsf@0.3/calibrated@0.6/log_spaced(64)@0.9/bptt"
    compare.show([result(long, 1, [50.0]), result(long, 2, [60.0]), result("bptt", 1, [55.0])], tmp_path)
    table_lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] and line[0] in "┏┃┡│└"]
    assert max(map(len, table_lines)) <= max(80, int(columns))
    text = "".join(line.split("│")[1].strip() for line in table_lines if line.startswith("│"))
    assert long in text  # wrapped, not truncated
    assert any("55.00 ± 7.07 (2)" in line for line in table_lines)
