"""The command line: what works, and every user error as one sentence, exit code 2, nothing written."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from conftest import ROOT

import statefeed as sf
from statefeed.lm import cli, config

RECIPES = ROOT / "recipes"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in an empty folder, so that whatever it writes is seen."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_print_config_is_a_recipe(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    for arguments in ([recipe, "--train.steps=5", "--print_config"], ["--print_config", "--train.steps=5", recipe]):
        assert cli.main(["train", *arguments]) == 0
        printed = capsys.readouterr().out
        assert yaml.safe_load(printed)["train"]["steps"] == 5
        assert yaml.safe_load(printed)["data"]["corpus"] == "pydoc"
        Path("again.yaml").write_text(printed)
        assert cli.main(["train", "again.yaml", "--print_config"]) == 0
        assert capsys.readouterr().out == printed
        Path("again.yaml").unlink()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["generate"], ["corpora"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if command:
        with pytest.raises(SystemExit) as left:
            cli.main([*command, "--help"])
        assert left.value.code == 0
    else:
        assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: statefeed")


USER_ERRORS = {
    "no command": ([], ", got none"),
    "unknown command": (["trian"], "expected a command (train, evaluate, generate, "),
    "unknown key": (["train", "--train.stepz=5"], "unknown key train.stepz: did you mean train.steps?"),
    "wrong type": (["train", "--train.steps=many"], "train.steps must be a whole number or null, got many"),
    "out of range": (["train", "--train.lr=-1"], "train.lr must be a positive number, got -1.0"),
    "missing recipe": (["train", "nowhere.yaml"], "the recipe nowhere.yaml does not exist\n"),
    "recipe not copied": (
        ["train", "recipes/quickstart.yaml"],
        "the recipe recipes/quickstart.yaml does not exist; `statefeed recipes quickstart` copies it\n",
    ),
    "misspelt recipe": (
        ["train", "recipes/quikstart.yaml"],
        "the recipe recipes/quikstart.yaml does not exist: did you mean quickstart.yaml?\n",
    ),
    "recipe of a comparison not copied": (
        ["compare", "ptb-gru-3x256.yaml", "--feedback=dsf"],
        "the recipe ptb-gru-3x256.yaml does not exist; `statefeed recipes ptb-gru-3x256` copies it\n",
    ),
    "corpus of a recipe not copied": (["corpora", "quickstart"], "; `statefeed recipes quickstart` copies it\n"),
    "recipe is a folder": (["train", "."], "the recipe . must be a YAML file, got a folder"),
    "recipe is a run": (["train", "{run}"], "char is the folder of a run: resume it with --resume"),
    "no run to resume": (["train", "nowhere", "--resume"], "there is no run folder or recipe nowhere to resume"),
    "two recipes": (["train", "a.yaml", "b.yaml"], "unrecognized arguments: b.yaml"),
    "missing text": (["train", "--data.corpus=text", "--data.path=nowhere.txt"], "no file or folder nowhere.txt"),
    "empty text": (["train", "--data.corpus=text", "--data.path={empty}"], "empty.txt is empty: expected UTF-8 text"),
    "undecodable": (["train", "--data.corpus=text", "--data.path={latin}"], "byte 0xe9 at offset 3 cannot be decoded"),
    "short text": (
        ["train", "{flags}", "--train.batch=1000", "--train.context=50"],
        "the train split of story.txt has ",
    ),
    "short valid": (["train", "{flags}", "--train.context=700"], "the valid split of story.txt has "),
    "unknown rule": (["train", "{flags}", "--model.feedback=dfs"], "model.feedback=dfs: "),
    "rule does not fit": (["train", "{flags}", "--model.cell=rnn", "--model.feedback=gate"], "model.feedback=gate: "),
    "taken folder": (["train", "{flags}", "--run.dir={run}"], "already holds a run: resume it with --resume"),
    "run is a file": (["train", "{flags}", "--run.dir={empty}"], "empty.txt is a file, not a folder"),
    "run inside a file": (["train", "{flags}", "--run.dir={empty}/run"], "empty.txt"),
    "no run": (["evaluate", "nowhere"], "nowhere is not a run folder: it holds no config.yaml"),
    "run not named": (["evaluate"], "run"),
    "unknown split": (["evaluate", "{run}", "--split=dev"], "split must be 'train', 'valid', 'test', 'all', got dev"),
    "foreign prompt": (["generate", "{run}", "--prompt=the §"], "--prompt: '§' is not among the "),
    "empty prompt": (["generate", "{run}", "--prompt="], "--prompt must hold at least one token, got ''"),
    "no tokens": (["generate", "{run}", "--tokens=0"], "--tokens must be at least 1, got 0"),
    "temperature": (["generate", "{run}", "--temperature=0"], "--temperature must be positive, got 0.0"),
    "top-k": (["generate", "{run}", "--top-k=0"], "--top-k must be at least 1, got 0"),
    "top-p": (["generate", "{run}", "--top-p=1.5"], "--top-p must be above 0 and at most 1, got 1.5"),
    "seed": (["generate", "{run}", "--seed=-1"], "--seed must be at least 0 and below 2^63, got -1"),
    "corpus without a path": (
        ["corpora", "--data.corpus=ptb"],
        "data.path must name a file or folder when data.corpus",
    ),
    "unknown corpus": (
        ["corpora", "--data.corpus=c4"],
        "data.corpus must be 'pydoc', 'ptb', 'wikitext', 'text', got c4",
    ),
    "comparison without alignment": (
        ["compare", "--feedback=dsf", "--train.alignment", "false"],
        "train.alignment must be true, or left out, got false",
    ),
    "generate key": (["generate", "{run}", "--topk=3"], "unknown key topk: did you mean top_k?"),
}


def test_a_suggested_key_exists(run: Path) -> None:
    assert cli.main(["generate", str(run), "--top_k=3", "--top_p=0.9", "--tokens=1"]) == 0


@pytest.mark.parametrize("error", USER_ERRORS)
def test_a_user_error_prints_one_sentence_and_writes_no_file(
    error: str, flags: list[str], run: Path, tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    places = {"run": run, "empty": tmp_path / "empty.txt", "latin": tmp_path / "latin.txt"}
    template, sentence = USER_ERRORS[error]
    arguments = []
    for word in template:
        arguments += flags if word == "{flags}" else [word.format(**places)]
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("statefeed: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert list(here.iterdir()) == []
    assert sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir()) == before


def test_a_word_outside_the_vocabulary_of_a_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "words"
    words = ["--data.tokens=word", "--data.vocabulary=8"]
    assert cli.main(["train", *flags, *words, f"--run.dir={folder}"]) == 0
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "--prompt=zebra"]) == 2
    assert capsys.readouterr().err == (f"statefeed: --prompt: 'zebra' is not among the 8 word tokens of {folder}\n")
    assert cli.main(["generate", str(folder), "--tokens=5"]) == 0


def test_corpora_are_listed(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert cli.main(["corpora"]) == 0
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line and not line.startswith(" ")}
    assert named == {*get_args(get_type_hints(config.Data)["corpus"]), "Files"}
    assert list(here.iterdir()) == []


def test_a_corpus_is_counted(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    for split, text in {"train": "to be\nor not\n", "valid": "to café\n"}.items():
        (here / f"ptb.{split}.txt").write_text(text, encoding="utf-8")
    assert cli.main(["corpora", str(RECIPES / "ptb-gru-1x256.yaml"), f"--data.path={here}"]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "here: 7 types of word tokens"  # to be or not, <bos>, <eos> and <unk>
    digests = [hashlib.sha256((here / f"ptb.{split}.txt").read_bytes()).hexdigest() for split in ("train", "valid")]
    assert [row.split() for row in rows] == [["train", "13", "9", digests[0]], ["valid", "9", "5", digests[1]]]


@pytest.mark.parametrize("command", [["corpora"], ["generate", "{run}", "--tokens=20"]])
def test_a_closed_output_is_not_an_error(command: list[str], run: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    words = [word.format(run=run) for word in command]
    done = subprocess.run(
        [sys.executable, "-m", "statefeed", *words], stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("size", [None, "two"])
def test_in_a_subprocess(here: Path, monkeypatch: pytest.MonkeyPatch, size: str | None) -> None:
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    done = subprocess.run(
        [sys.executable, "-m", "statefeed", "train", "nowhere.yaml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "statefeed: the recipe nowhere.yaml does not exist\n"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["train", "--help"], 0),
        (["compare", "--help"], 0),
        (["bench", "layers", "--help"], 0),
        (["corpora"], 0),
        (["train", str(RECIPES / "quickstart.yaml"), "--print_config"], 0),
        ([], 2),
        (["trian"], 2),
        (["train", "--train.stepz=5"], 2),
        (["train", "nowhere.yaml"], 2),
        (["train", "--train.lr=-1"], 2),
        (["evaluate"], 2),
        (["compare", "--seeds=3"], 2),
        (["report"], 2),
        (["bench", "layer"], 2),
        (["bench", "layers", "--shapes=3"], 2),
        (["bench", "scan", "--methods=newton"], 2),
    ],
)
def test_help_version_and_usage_errors_import_no_torch(words: list[str], code: int) -> None:
    program = (
        "import sys; from statefeed.__main__ import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "[]"), done.stderr


def test_torch_is_imported_with_the_first_public_name() -> None:
    program = (
        "import sys, types, statefeed.lm.config\n"
        "import statefeed as sf; assert 'torch' not in sys.modules\n"
        "import statefeed.swap  # a module that is named as a function of the API\n"
        "assert isinstance(sf.swap, types.FunctionType) and set(sf.__all__) <= set(dir(sf))\n"
        "assert 'torch' in sys.modules and sf.GRU.__module__ == 'statefeed'\n"
        "try: sf.gru\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "module 'statefeed' has no attribute 'gru'\n"), done.stderr


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "statefeed", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"statefeed {sf.__version__}\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("word", ["--version", "--help"])
def test_a_full_disk_behind_standard_output_is_one_sentence(word: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "statefeed", word], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(": No space left on device\n")


@pytest.mark.parametrize(
    ("word", "meant"), [("trian", "train"), ("eval", "evaluate"), ("benchmark", "bench"), ("xyz", None)]
)
def test_the_command_that_was_meant(word: str, meant: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    err = capsys.readouterr().err
    assert err.endswith(f"got {word}" + (f": did you mean {meant}?\n" if meant else "\n"))


@pytest.mark.parametrize("missing", ["jsonargparse", "safetensors"])
def test_without_the_application_the_error_has_the_install_command(missing: str) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest)\n"
        "from statefeed.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'statefeed: the command line needs {missing}: pip install "statefeed[lm]"\n'


def test_denormals_become_zero_in_every_thread_of_the_command_line_and_not_on_import() -> None:
    code = (
        "import torch; from statefeed.lm import cli\n"
        "tiny = lambda: int((torch.full((4_000_000,), 1e-40) * 1.0).count_nonzero())\n"
        "assert (torch.tensor(1e-40) * 1.0).item() > 0\n"
        "cli.configure_process(); print(tiny())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr
