"""statefeed bench training: all contenders train the same model on the same batches, and records are correct."""

import json
import lzma
import statistics
from pathlib import Path

import pytest
import torch

from statefeed.bench import main, training, training_contenders, training_text
from statefeed.bench.measure import SHIPPED
from statefeed.bench.options import OptionError
from statefeed.lm import model as lm_model
from statefeed.lm import recipe

RECIPES = Path(__file__).parent.parent / "recipes"
RULES = ["bptt", "dsf", "gate+1"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PTB = training_contenders.RECIPES["ptb-gru-1x256"]
SMALL = PTB._replace(width=16, batch=8)


def small():
    """The sentences, and every contender in float32 with a width of 16."""
    source, vocabulary, _ = training_text.load_text(training.Options(smoke=True), SMALL)
    return source, training_contenders.contenders(SMALL, vocabulary, RULES, {"float32": [SHIPPED]}, "cpu")


@pytest.mark.parametrize("name", training_contenders.RECIPES)
def test_a_recipe_is_the_published_one(name):
    published, ours = recipe.load(RECIPES / f"{name}.yaml"), training_contenders.RECIPES[name]
    assert ours == training_contenders.Recipe(
        published.model.layers,
        published.model.width,
        published.model.block,
        published.data.batches,
        published.train.context,
        published.train.weight_decay,
        published.train.batch,
        published.train.lr,
    )
    assert (published.model.cell, published.train.optimizer, published.train.clip) == ("gru", "adam", None)
    assert published.data.vocabulary in (None, training_text.BYTE_PAIRS)


def test_smoke_of_wikitext(tmp_path):
    output = tmp_path / "records.jsonl"
    flags = ["--recipe=wikitext103-gru-3x512", "--rules=dsf", "--dtypes=float32"]
    assert main(["training", "--smoke", *flags, f"--output={output}"]) == 0
    for record in map(json.loads, output.read_text().splitlines()):
        place = (record["recipe"], record["corpus"], record["layers"], record["vocabulary"], record["context"])
        assert place == ("wikitext103-gru-3x512", "made-up byte pairs", 3, 257, 256)
        assert record["tokens"]["median"] == record["steps"] * record["batch"] * 256


def test_smoke(tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    assert main(["training", "--smoke", "--rules=dsf", f"--output={output}"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    names = [(r["implementation"], r["variant"], r["dtype"]) for r in records if r["implementation"] != "torch.nn"]
    assert names == [
        (implementation, "dsf", dtype)
        for dtype in ("float32", "bfloat16")
        for implementation in ("published", "statefeed")
    ]
    for record in records:
        assert (record["bench"], record["cell"], record["layers"], record["width"]) == ("training", "gru", 1, 16)
        assert record["corpus"].startswith("made-up sentences with the lengths of Penn Treebank")
        assert {"published float32", "torch.nn as shipped", "torch.nn at its best"} <= record[
            "times_faster_than"
        ].keys()
        assert (record["kernels"] is None) == (record["implementation"] != "statefeed")
        assert {"commit", "machine", "threads", "denormals"} <= record.keys()
    assert "x published float32" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 1000


def test_speeds_and_ratios_are_per_repetition(monkeypatch):
    turns = {"torch.nn as shipped": 4.0, "published dsf": 3.0, "statefeed dsf": 0.5}
    seconds = {f"{name} float32": [(s,), (2 * s,), (s,), (s,), (s,)] for name, s in turns.items()}
    monkeypatch.setattr(training, "interleaved", lambda contenders, _: {name: seconds[name] for name in contenders})
    monkeypatch.setattr(training, "float32_settings", lambda _: [SHIPPED])
    monkeypatch.setitem(training_contenders.RECIPES, "ptb-gru-1x256", PTB._replace(width=8, batch=8))
    monkeypatch.setattr(training_text, "SENTENCES", 100)
    monkeypatch.setattr(training_text, "WORDS", 20)
    options = training.Options(repeats=5, dtypes="float32", rules="dsf", steps=2)
    records = {f"{r['implementation']} {r['variant']}": r for r in training.run(options)}
    ours = records["statefeed dsf"]
    assert ours["times_faster_than"]["published float32"] == {"median": 6.0, "min": 6.0, "max": 6.0}
    assert ours["times_faster_than"]["torch.nn at its best"]["median"] == 8.0
    assert records["torch.nn as shipped"]["times_faster_than"]["published float32"]["median"] == 0.75
    assert ours["step_ms"] == {"median": 250.0, "min": 250.0, "max": 500.0}
    # Words of the sentences and one <eos> each: counted from the text, in the order of every measured epoch.
    lengths = [len(line.split()) + 1 for line in training_text.made_up(100, 20).splitlines()]
    source, _, _ = training_text.load_text(options, PTB._replace(batch=8))
    counts = []
    for epoch in range(1, 6):
        batches = [batch for _, batch in zip(range(2), source.epoch(epoch), strict=False)]
        found = [int(n) for batch in batches for n in batch.lengths]
        assert not set(found) - {min(length, 64) for length in lengths}
        counts.append(sum(found))
    assert ours["tokens"]["median"] == statistics.median(counts)
    speeds = [count / s for count, (s,) in zip(counts, seconds["statefeed dsf float32"], strict=True)]
    assert ours["tokens_per_s"]["median"] == pytest.approx(statistics.median(speeds))


def test_all_contenders_take_the_same_steps():
    """Three steps later the exact ones still have the same weights, and those of dsf; the two kinds differ."""
    source, entries = small()
    for entry in entries:
        entry.train(source, 3)
    weights = {
        e.name: {training_contenders.layer_name(name): p.detach().double() for name, p in e.model.named_parameters()}
        for e in entries
    }
    exact, published = weights["torch.nn as shipped float32"], weights["published dsf float32"]
    for name in exact:
        assert torch.allclose(weights["statefeed bptt float32"][name], exact[name], atol=1e-5)
        assert torch.allclose(weights["statefeed dsf float32"][name], published[name], atol=1e-5)
    name = "blocks.0.rnn.weight_hh_l0"
    assert not torch.allclose(exact[name], published[name], atol=1e-4)


@pytest.mark.parametrize("wrong", ["published", "loss", "gradient"])
def test_parity_catches_a_planted_error_before_anything_is_timed(wrong, monkeypatch, capsys, tmp_path):
    def timed(*_):
        raise AssertionError("timed")

    monkeypatch.setattr(training, "interleaved", timed)
    if wrong == "published":  # exact where dsf is meant
        _, entries = small()
        entries[1].model.blocks[0].rnn.recurrence = lambda gru, x: gru(x)
        source, _, _ = training_text.load_text(training.Options(smoke=True), SMALL)
        with pytest.raises(training.ParityError, match=r"gradient .* of published dsf"):
            training.check_parity(SMALL, entries, next(source.epoch(0)))
        return
    right = lm_model.LanguageModel.loss

    def loss(self, batch, states=None):
        found = right(self, batch, states)
        if wrong == "loss":  # a mean that includes padding
            return found._replace(tokens=batch.targets.numel())
        return found._replace(sum=found.sum * 0.5 + found.sum.detach() * 0.5)

    monkeypatch.setattr(lm_model.LanguageModel, "loss", loss)
    output = tmp_path / "records.jsonl"
    assert main(["training", "--smoke", "--rules=dsf", f"--output={output}"]) == 1
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert f"the {wrong} " in printed
    assert "nothing was timed" in printed
    assert not output.exists()


def test_generated_sentences_have_the_lengths_of_penn_treebank_and_every_word():
    lines = training_text.made_up(4000, 500).splitlines()
    lengths = [len(line.split()) for line in lines]
    assert statistics.mean(lengths) == pytest.approx(21.1, rel=0.05)
    assert (min(lengths) >= 1, max(lengths) <= 82, statistics.median(lengths)) == (True, True, pytest.approx(20, abs=1))
    assert len({word for line in lines for word in line.split()}) == 500


def test_the_corpus_of_a_flag_is_read(tmp_path):
    text = "a b c\nb c\n" * 40
    (tmp_path / "ptb.train.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "ptb.valid.txt").write_text("a b\n")
    source, vocabulary, corpus = training_text.load_text(training.Options(data=str(tmp_path)), PTB)
    (batch,) = source.epoch(0)
    assert sorted(batch.lengths.tolist()) == [3] * 40 + [4] * 40
    assert corpus == {"corpus": "the training split in --data", "vocabulary": vocabulary}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"data": "no/such/folder"}, "data must be a folder"),
        ({"data": ".", "recipe": "wikitext103-gru-3x512"}, "data is for the recipe ptb-gru-1x256"),
        ({"rules": "fast"}, "feedback must be"),
        ({"dtypes": "int8"}, "dtypes must be among"),
        ({"repeats": 4}, "repeats must be at least 5"),
    ],
)
def test_a_user_error_raises(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        training.Options(**options)


def test_a_folder_without_the_corpus_raises(tmp_path):
    (tmp_path / "notes.txt").write_text("a\n")
    with pytest.raises(OptionError, match=r"ptb\..*train"):
        list(training.run(training.Options(data=str(tmp_path))))
