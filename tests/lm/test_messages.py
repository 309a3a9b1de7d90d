"""What a user may write and what is said of it: scalars of YAML, other names of keys, arguments that are no text."""

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import sentences

import statefeed as sf
from statefeed.lm import cli
from statefeed.lm import recipe as recipes
from statefeed.lm.config import Data, Train
from statefeed.lm.data import batches, tokens
from statefeed.lm.errors import UsageError
from statefeed.lm.run import train as training
from statefeed.lm.run.generate import scale_logits


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("statefeed: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "written", ["2024_05_01", "12:30", "2024-05-01", "2024-13-45", "0x10", "010", "1e3", "yes", "off", "'~x'", "1.50"]
)
def test_text_in_a_recipe_is_what_is_written(written: str) -> None:
    Path("recipe.yaml").write_text(f"run: {{dir: {written}}}\ndata: {{corpus: text, path: {written}}}\n")
    recipe = recipes.load(Path("recipe.yaml"))
    assert (recipe.run.dir, recipe.data.path) == (written.strip("'"), written.strip("'"))
    Path("again.yaml").write_text(recipe.to_yaml())
    assert recipes.load(Path("again.yaml")) == recipe
    recipes.change(Path("again.yaml"), {"train.steps": 3}, Path())
    assert recipes.load(Path("again.yaml")).run == recipe.run


@pytest.mark.parametrize(
    ("written", "value"),
    [("10", 10), ("1_000", 1000), ("010", 10), ("1:30", None), ("2024-05-01", None), ("0x1", None)],
)
def test_numbers_in_a_recipe_are_decimal(written: str, value: int | None) -> None:
    Path("recipe.yaml").write_text(f"train: {{steps: {written}}}\n")
    flags = recipes.parser("statefeed train")
    if value is None:
        with pytest.raises(UsageError, match=r"train\.steps must be a (decimal|whole) number.*, got"):
            recipes.parse(flags, [f"--train.steps={written}"])
        with pytest.raises(UsageError, match=r"train\.steps must be a (decimal|whole) number.*, got"):
            recipes.load(Path("recipe.yaml"))
    else:
        assert recipes.load(Path("recipe.yaml")).train.steps == value
        assert recipes.parse(flags, [f"--train.steps={written}"]).train.steps == value


@pytest.mark.parametrize(("written", "value"), [("1e-3", 1e-3), ("2.5E-1", 0.25), (".5", 0.5), ("1.", 1.0), ("3", 3.0)])
def test_rates_in_a_recipe(written: str, value: float) -> None:
    Path("recipe.yaml").write_text(f"train: {{lr: {written}}}\nmodel: {{feedback: {written}}}\n")
    recipe = recipes.load(Path("recipe.yaml"))
    assert (recipe.train.lr, recipe.model.feedback) == (value, value)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--train.learning_rate=3", "train.lr"),
        ("--lr=1e-3", "train.lr"),
        ("--learning-rate=1", "train.lr"),
        ("--batch_size=3", "train.batch"),
        ("--model.hidden_size=3", "model.width"),
        ("--out_dir=x", "run.dir"),
        ("--train.stepz=3", "train.steps"),
    ],
)
def test_a_similar_key_is_suggested(flag: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"did you mean {meant}?" in sentence(["train", flag], capsys)


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--model.cell=gruu", "got gruu: did you mean gru?"),
        ("--model.cell=LSTM", "got LSTM: did you mean lstm?"),
        ("--data.corpus=wikitext103", "got wikitext103: did you mean wikitext?"),
        ("--train.optimizer=rmsprop", "got rmsprop\n"),
    ],
)
def test_the_value_that_was_meant(flag: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in sentence(["train", flag], capsys)


def test_a_text_in_place_of_a_recipe_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("many words " * 1000)
    err = sentence(["train", "a.txt"], capsys)
    assert "--data.corpus=text --data.path=FILE" in err
    assert len(err) < 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--run.dir=~nosuchuser/x"],
        ["train", "--data.corpus=text", "--data.path=~nosuchuser/x"],
        ["train", "--data.corpus=ptb", "--data.path=~nosuchuser/x"],
        ["train", "~nosuchuser/a.yaml"],
        ["train", "--resume", "~nosuchuser/a"],
        ["evaluate", "~nosuchuser/a"],
        ["generate", "~nosuchuser/a"],
        ["report", "~nosuchuser/a"],
        ["compare", "--feedback=dsf", "--out=~nosuchuser/a"],
        ["corpora", "--data.corpus=text", "--data.path=~nosuchuser/x"],
    ],
)
def test_a_home_folder_that_does_not_exist(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "begins with a home folder that does not exist" in sentence(arguments, capsys)


def test_the_home_folder_of_a_run(
    flags: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    assert cli.main(["train", *flags, "--run.dir=~/runs/a"]) == 0
    assert (here / "home" / "runs" / "a" / "weights.safetensors").is_file()
    assert cli.main(["evaluate", "~/runs/a"]) == 0
    assert cli.main(["train", "--resume", "~/runs/a"]) == 0
    assert cli.main(["train", "--resume", "--run.dir=~/runs/a"]) == 0
    assert cli.main(["report", "~/runs/a", "-o", "~/page.html"]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["home"]


@pytest.mark.parametrize(
    "command", [["generate", "run", "--prompt=caf\udce9"], ["train", "--run.dir=\udcff"], ["\udce9"]]
)
def test_arguments_that_are_no_text(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "arguments must be UTF-8 text, got byte 0x" in sentence(command, capsys)


@pytest.mark.parametrize("key", ["model.width", "train.batch", "train.steps", "train.decay_after", "data.vocabulary"])
def test_numbers_beyond_64_bits(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{key} must be below 2^63, got 1{20 * '0'}" in sentence(["train", f"--{key}=1{20 * '0'}"], capsys)


@pytest.mark.parametrize("width", [10**8, 10**12, 2**62])
def test_a_model_larger_than_memory_raises(width: int, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    err = sentence(["train", *flags, f"--model.width={width}"], capsys)
    assert "lower model.width" in err
    assert "train.batch" not in err


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-320])
def test_a_temperature_near_zero_is_its_limit(temperature: float, run: Path) -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, -2.0])
    assert scale_logits(logits, temperature).softmax(0).tolist() == [0.0, 0.5, 0.5, 0.0]
    assert torch.equal(scale_logits(logits, 0.5), logits / 0.5)
    assert cli.main(["generate", str(run), f"--temperature={temperature}", "--tokens=5"]) == 0


def test_two_folders_to_resume(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = sentence(["train", "--resume", str(run), "--run.dir=other"], capsys)
    assert "names the folder of the run, and --run.dir another, other: give one" in err


@pytest.mark.parametrize("command", [["train", "--run.dir=x"], ["compare", "--feedback=dsf", "--out=x"]])
@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["metrics.jsonl", "tokenizer.json", "curves.png"])
def test_a_file_of_a_run_that_links_to_the_text(
    name: str,
    link: Callable[[Path, Path], None],
    command: list[str],
    flags: list[str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "x").mkdir()
    (here / "texts").mkdir()
    text = here / "texts" / "a.txt"
    text.write_text(sentences(400))
    link(text, here / "x" / name)
    words = [*command, *(flag for flag in flags if "path" not in flag)]
    for path in ("texts", "texts/a.txt"):
        err = sentence([*words, f"--data.path={path}"], capsys)
        assert "run.dir must be another folder than the text of data.path" in err
    assert text.read_text() == sentences(400)
    assert [path.name for path in (here / "x").iterdir()] == [name]


def test_a_folder_that_links_to_the_text(flags: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text(sentences(400))
    (here / "x").symlink_to("texts")
    words = ["train", "--run.dir=x", *(flag for flag in flags if "path" not in flag), "--data.path=texts"]
    assert "run.dir must be another folder than the text of data.path" in sentence(words, capsys)
    assert [path.name for path in (here / "texts").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", [".", "text.txt", "metrics.jsonl", "checkpoints", "checkpoints/text.txt"])
@pytest.mark.parametrize("command", [["train", "--run.dir=x"], ["compare", "--feedback=dsf", "--out=x"]])
def test_a_run_folder_that_overlaps_the_text_raises(
    command: list[str], name: str, flags: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = here / "x" / name
    file = text if text.suffix else text / "a.txt"
    file.parent.mkdir(parents=True)
    file.write_text(sentences(400))
    words = [*command, *(flag for flag in flags if "path" not in flag), f"--data.path=x/{name}"]
    if name == "text.txt":  # which no run writes
        if command[0] == "train":
            assert cli.main(words) == 0
            assert cli.main(["evaluate", "x"]) == 0
        return
    before = sorted(here.rglob("*"))
    assert "run.dir must be another folder than the text of data.path" in sentence(words, capsys)
    assert sorted(here.rglob("*")) == before


def test_a_warning_of_the_library_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", cli.show_warning)
    monkeypatch.setattr(cli, "shown_warnings", set())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = cli.show_warning
        warnings.warn("torch does the work:\nno compiler", RuntimeWarning, stacklevel=1)
        for _ in range(2):
            sf.Schedule("dsf+2")  # which is warned of inside the package
    first, second = capsys.readouterr().err.splitlines()
    assert first == "statefeed: torch does the work: no compiler"
    assert second.startswith('statefeed: feedback "dsf+2" adds corrections')


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
def test_a_hangup_saves_as_a_termination_does(
    flags: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = training.seed_step

    def interrupted(recipe: Train, step: int, columns: int, rank: int) -> torch.Tensor:
        if step == 6:
            os.kill(os.getpid(), signal.SIGHUP)
        return draw(recipe, step, columns, rank)

    monkeypatch.setattr(training, "seed_step", interrupted)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        assert cli.main(["train", *flags, "--run.dir=run"]) == 128 + signal.SIGHUP
        assert "interrupted after step 6 of 12: run keeps the checkpoint of step 6" in capsys.readouterr().err
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        assert cli.main(["train", *flags, "--run.dir=nohup"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_byte_pairs_of_text_without_white_space(capsys: pytest.CaptureFixture[str]) -> None:
    place, letters = 7, []
    for _ in range(20_000):
        place = (place * 1103 + 12345) % 65536
        letters.append("ACDEFGHIKLMNPQRSTVWY"[place // 256 % 20])
    text = "".join(letters)
    found = tokens.train(Data(tokens="bpe", vocabulary=300), {"train": text})
    assert "the text has 20,000 characters without white space between them" in capsys.readouterr().err
    assert found.decode(found.encode(text).tolist()) == text
    loaded = tokens.BytePairs.from_json(found.to_json())
    assert loaded.encode(text).tolist() == found.encode(text).tolist()
    usual = tokens.train(Data(tokens="bpe", vocabulary=300), {"train": sentences(50)})
    assert "FixedLength" not in usual.to_json()
    assert "FixedLength" in found.to_json()


def test_truncation_of_most_tokens_gives_a_notice(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.tokens=word", "--data.batches=sentences", "--train.steps=2", "--train.evaluations=1"]
    for context, noticed in ((2, True), (16, False)):
        capsys.readouterr()
        assert cli.main(["train", *flags, *words, f"--train.context={context}", f"--run.dir=run-{context}"]) == 0
        assert ("data.batches=sentences trains on" in capsys.readouterr().err) == noticed
    source = batches.Sentences(tokens.train(Data(tokens="byte"), {}).encode("aXYZaXaXYYYY"), 2, 2)
    assert (source.tokens, source.trained) == (9, 5)


def test_a_shell_that_passes_bytes(run: Path) -> None:
    command = [sys.executable, "-m", "statefeed", "generate", str(run), b"--prompt=caf\xe9"]
    done = subprocess.run(command, check=False, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith(b"statefeed: arguments must be UTF-8 text, got byte 0xe9 at offset 12 of ")


WRONG_RECIPES = {
    "--model.feedback=DSF": "model.feedback=DSF: feedback must be ",
    "--model.feedback=dsf/gate": "model.feedback=dsf/gate: ",
    "--train.precision=float16": "train.precision=float16 needs a GPU",
    "--train.accumulate=3": "train.batch must be a multiple of train.accumulate",
    "--data.path=nowhere.txt": "there is no file or folder nowhere.txt",
}


@pytest.mark.parametrize("command", [["train", "--run.dir={run}"], ["train", "--resume", "{run}"]], ids=["new", "old"])
@pytest.mark.parametrize("wrong", WRONG_RECIPES)
def test_a_recipe_is_checked_before_the_folder(
    wrong: str, command: list[str], run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(run=run) for word in command]
    assert WRONG_RECIPES[wrong] in sentence([*words, *flags, "--train.device=cpu", wrong], capsys)


def test_the_rules_of_a_comparison_are_checked_before_its_folder(
    flags: list[str], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *flags, f"--out={text}"]
    assert "--feedback DSF: feedback must be " in sentence([*words, "--feedback=dsf,DSF"], capsys)
    assert "must be another folder than the text" in sentence([*words, "--feedback=dsf"], capsys)


LARGE = {
    "data.vocabulary": ["--data.tokens=bpe", f"--data.vocabulary={2**63 - 1}"],
    "train.eval_batch": [f"--train.eval_batch={2**63 - 1}"],
    "train.evaluations": [f"--train.evaluations={2**63 - 1}"],
}


@pytest.mark.parametrize("key", LARGE)
def test_large_numbers_that_mean_no_limit(key: str, flags: list[str]) -> None:
    assert cli.main(["train", *flags, "--train.steps=2", "--run.dir=x", *LARGE[key]]) == 0


@pytest.mark.parametrize("layers", [10**9, 2**62])
def test_layers_that_no_memory_holds(layers: int, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    err = sentence(["train", *flags, "--run.dir=x", f"--model.layers={layers}"], capsys)
    assert f"the weights of model.width=16 and model.layers={layers} with " in err


def test_more_seeds_and_corrections_than_there_can_be(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    err = sentence(["compare", *flags, "--feedback=dsf", f"--seeds={10**20}"], capsys)
    assert f"--seeds must be between 1 and 1,000, got {10**20}" in err
    err = sentence(["train", *flags, f"--model.feedback=gate+{2**31}"], capsys)
    assert f"corrections must be below 2^31, got {2**31}" in err


def test_a_top_p_near_zero_is_the_likeliest_token(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for flag in ("--top-p=1e-300", "--top-k=1"):
        capsys.readouterr()
        assert cli.main(["generate", str(run), flag, "--tokens=9"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("command", ["compare", "corpora", "train"])
def test_the_home_folder_of_a_recipe(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "home").mkdir()
    (here / "home" / "r.yaml").write_text("train: {lr: -1}")
    more = ["--feedback=dsf"] if command == "compare" else []
    assert "train.lr must be a positive number, got -1.0" in sentence([command, "~/r.yaml", *more], capsys)
