"""The recipe: flags, YAML and defaults say the same; every wrong value is refused with its key and the value."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import statefeed as sf
from statefeed.lm import cli, config
from statefeed.lm import recipe as recipes
from statefeed.lm.config import Config, Data, Model, Train, UsageError

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def parsed(*arguments: str, path: Path | None = None) -> Config:
    return recipes.build(recipes.parse(recipes.parser("test"), arguments, path))


def test_no_flags_are_the_defaults() -> None:
    assert parsed() == Config()


def test_every_field_is_a_flag_and_has_help() -> None:
    helped = recipes.parser("test").format_help()
    for section, kind in config.SECTIONS.items():
        for item in dataclasses.fields(kind):
            assert f"--{section}.{item.name}" in helped
            assert item.metadata["help"]


def test_yaml_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = Config(
        data=Data(corpus="text", path="x: #y.txt", tokens="word", vocabulary=90, eos=False),
        model=Model(feedback=0.5, cell="lstm"),
        train=Train(steps=7, lr=1e-5, clip=None),
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert recipes.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(("encoding", "path"), [("ascii", "日本"), ("latin-1", "tëxt"), ("UTF8", "日本")])
def test_yaml_reads_back_in_every_encoding(encoding: str, path: str, tmp_path: Path) -> None:
    config = Config(data=Data(corpus="text", path=path))
    (tmp_path / "r.yaml").write_text(config.to_yaml(encoding), encoding=encoding)
    assert recipes.load(tmp_path / "r.yaml") == config


def test_a_flag_overrides_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {lr: 1e-4, steps: 7, clip: null}\nmodel: {feedback: gate+1}\n")
    recipe = parsed("--train.steps=9", path=path)
    assert (recipe.train.steps, recipe.train.lr, recipe.train.clip, recipe.model.feedback) == (9, 1e-4, None, "gate+1")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--train.lrr=1", "unknown key train.lrr: did you mean train.lr?"),
        ("--zzz=1", "unknown key zzz; --help lists every key"),
        ("--train.lr=fast", "train.lr must be a number, got fast"),
        ("--train.lr=null", "train.lr must be a number, got None"),
        ("--train.steps=1.5", "train.steps must be a whole number or null, got 1.5"),
        ("--data.eos=maybe", "data.eos must be true or false, got maybe"),
        ("--data.corpus=web", "data.corpus must be 'pydoc', 'ptb', 'wikitext', 'text', got web"),
        ("--train.lr=0", "train.lr must be a positive number, got 0.0"),
        ("--train.lr=inf", "train.lr must be a"),
        ("--train.steps=0", "train.steps must be at least 1, got 0"),
        ("--train.epochs=0", "train.epochs must be at least 1, got 0"),
        ("--train.batch=-1", "train.batch must be at least 1, got -1"),
        ("--train.context=0", "train.context must be at least 1, got 0"),
        ("--train.state_reset_prob=1.5", "train.state_reset_prob must be between 0 and 1, got 1.5"),
        ("--train.clip=0", "train.clip must be positive, or null for no limit, got 0.0"),
        ("--train.weight_decay=-1", "train.weight_decay must be at least 0, got -1.0"),
        ("--train.warmup=-1", "train.warmup must be a whole number of steps, or a fraction of them from 0"),
        ("--train.warmup=.inf", "train.warmup must be a whole number of steps, or a fraction of them from 0"),
        ("--train.warmup=1.5", "train.warmup must be a whole number of steps, or a fraction of them from 0"),
        ("--train.floor=2", "train.floor must be between 0 and 1, got 2.0"),
        ("--train.decay=0", "train.decay must be above 0 and at most 1, got 0.0"),
        ("--train.decay_after=0", "train.decay_after must be at least 1, got 0"),
        ("--train.decay_every=0", "train.decay_every must be at least 1, got 0"),
        ("--train.eval_batch=0", "train.eval_batch must be at least 1, got 0"),
        ("--data.batches=sentences", "data.batches=sentences needs data.tokens=word with data.eos=true"),
        (
            "--model.cell=s4d --model.feedback=dsf",
            "model.feedback must be bptt where model.cell is s4d, whose gradient is always exact",
        ),
        ("--model.cell=mingru --model.feedback=bptt --model.forward=newton", "model.forward must be sequential where"),
        ("--model.forward=newton --train.compile=default", "train.compile must be null unless model.forward is"),
        ("--model.uniform=0", "model.uniform must be a positive number of at most 1e38, or null, got 0.0"),
        ("--model.uniform=1e308", "model.uniform must be a positive number of at most 1e38, or null, got 1e+308"),
        ("--model.window=0", "model.window must be at least 1, got 0"),
        ("--model.modes=0", "model.modes must be at least 1, got 0"),
        ("--train.device=tpu", "train.device must be 'auto', 'cpu', 'cuda', got tpu"),
        ("--train.parallel=tp", "train.parallel must be 'ddp', 'fsdp', got tp"),
        ("--train.evaluations=0", "train.evaluations must be at least 1, got 0"),
        ("--train.seed=-1", "train.seed must be at least 0 and below 2^63, got -1"),
        ("--model.layers=0", "model.layers must be at least 1, got 0"),
        ("--model.width=0", "model.width must be at least 1, got 0"),
        ("--model.dropout=1", "model.dropout must be at least 0 and below 1, got 1.0"),
        ("--data.valid=0", "data.valid must be between 0 and 1, both excluded, got 0.0"),
        ("--data.test=1", "data.test must be at least 0 and below 1, got 1.0"),
        ("--data.valid=0.96", "data.valid + data.test must leave text to train on"),
        ("--data.vocabulary=256", "data.vocabulary must be at least 257 for bpe tokens"),
        ("--data.path=x", "data.path must be null for pydoc, which reads no path, got x"),
        ("--data.corpus=text", "data.path must name a file or folder when data.corpus is text"),
        ("--data.corpus=ptb", "data.path must name a file or folder when data.corpus is ptb"),
        ("--run.dir=", "run.dir must name a folder, got ''"),
        ("--train.lr", "argument --train.lr: expected one argument"),
    ],
)
def test_a_wrong_flag_raises(flag: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(*flag.split())
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unused_vocabulary_size_raises() -> None:
    with pytest.raises(UsageError, match=r"data\.vocabulary must be null for char tokens"):
        Data(tokens="char", vocabulary=10)
    with pytest.raises(UsageError, match="at least 3 for word tokens"):
        Data(tokens="word", vocabulary=2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must hold sections"),
        (b"- 3\n", "must hold sections"),
        (b"optim: {lr: 1}\n", "unknown section 'optim'"),
        (b"train: 3\n", "section 'train' of"),
        (b"train: {lr: 1\n", "is not valid YAML"),
        (b"train:\n  lr: 1\n  steps: 3\n  lr: 2\n", "is not valid YAML: the key lr is twice in one mapping"),
        (b"train: {lr: 1}\nmodel: {width: 8}\ntrain: {steps: 3}\n", "the key train is twice in one mapping"),
        (b"train: \xff\n", "is not UTF-8 text: byte 7 cannot be decoded"),
    ],
)
def test_a_wrong_recipe_raises(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        recipes.read(path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml does not exist"):
        recipes.read(tmp_path / "nowhere.yaml")


def test_a_recipe_without_the_file_of_its_base(tmp_path: Path) -> None:
    path = tmp_path / "ptb-gru-3x256.yaml"
    path.write_text("base: base/ptb.yaml\n")
    with pytest.raises(UsageError, match=r"ptb\.yaml does not exist; `statefeed recipes ptb-gru-3x256` copies it$"):
        recipes.read(path)


def test_the_default_rule_is_that_of_the_library_and_help_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert Config().model.feedback == str(sf.GRU(1, 1).feedback) == "bptt"
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "gate+1, ... (type: float | str, default: bptt)" in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_its_rule(path: Path) -> None:
    assert "feedback" in recipes.read(path)["model"]


def test_attention_heads_must_fit_the_width() -> None:
    with pytest.raises(UsageError, match=r"model\.width must be a multiple of twice model\.heads, 16, got 40"):
        Model(cell="transformer", feedback="bptt", width=40)
    with pytest.raises(UsageError, match=r"model\.heads must be at least 1, got 0"):
        Model(cell="transformer", feedback="bptt", heads=0)


def test_a_recipe_overrides_its_base(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "common.yaml").write_text("train: {lr: 1.0, steps: 7}\nmodel: {width: 8}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text("base: bases/common.yaml\ntrain: {lr: 2.0}\nrun: {dir: x}\n")
    recipe = parsed("--train.steps=9", path=path)
    assert (recipe.train.lr, recipe.train.steps, recipe.model.width, recipe.run.dir) == (2.0, 9, 8, "x")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("base: nowhere.yaml\n", "nowhere.yaml does not exist"),
        ("base: 3\n", "base of "),
        ("base: recipe.yaml\n", "must not have a base itself, got 'recipe.yaml'"),
        ("train: {lrr: 1}\n", "unknown key train.lrr: did you mean train.lr?"),
        ("train: {lr: fast}\n", "train.lr must be a number, got fast"),
        ("train: {restart: 2}\n", "train.state_reset_prob must be between 0 and 1, got 2"),  # the key of older recipes
    ],
)
def test_a_wrong_base_or_value_raises(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as refused:
        parsed(path=path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = recipes.load(path)
    written = yaml.safe_load(recipe.to_yaml())
    for section, keys in recipes.read(path).items():
        for key, value in keys.items():
            assert written[section][key] == value
    assert recipe.run.dir == f"runs/{path.stem}"


def test_alignment_needs_unsharded_weights() -> None:
    with pytest.raises(UsageError, match=r"train\.parallel must be ddp, got fsdp"):
        parsed("--train.parallel=fsdp", "--train.alignment=true")
