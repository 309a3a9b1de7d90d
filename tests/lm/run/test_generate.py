"""Sampling: the state carries the past, the seed decides the text, and the filters leave what they say."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from statefeed.lm import cli
from statefeed.lm.config import Model
from statefeed.lm.model import LanguageModel, State
from statefeed.lm.run.generate import generate

V = 13


@pytest.fixture(params=["rnn", "gru", "lstm"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(Model(cell=request.param, width=8), V)
    model.head.weight.data *= 200  # far from uniform
    return model.eval()


def test_greedy_sampling_is_the_argmax_of_a_call_on_the_full_text(model: LanguageModel) -> None:
    text = [3, 1, 4]
    sampled = list(islice(generate(model, text, top_k=1), 20))
    for token in sampled:
        assert token == model(torch.tensor(text).unsqueeze(1))[0][-1, 0].argmax()
        text.append(token)


def test_each_token_reads_one_token(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = model.forward

    def counted(tokens: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        shapes.append(tuple(tokens.shape))
        return forward(tokens, states)

    monkeypatch.setattr(model, "forward", counted)
    list(islice(generate(model, [1, 2, 3]), 4))
    assert shapes == [(3, 1), (1, 1), (1, 1), (1, 1)]


def test_the_seed_decides(model: LanguageModel) -> None:
    def sample(seed: int) -> list[int]:
        return list(islice(generate(model, [1], temperature=2.0, seed=seed), 40))

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


def test_sentences_are_sampled_apart_from_each_other(model: LanguageModel) -> None:
    """What came before the last `<bos>` of the prompt, and before a sampled `<eos>`, decides nothing."""
    begin, end = 0, 1
    alone = list(islice(generate(model, [begin, 5], sentence=(begin, end)), 60))
    assert list(islice(generate(model, [begin, 7, end, begin, 5], sentence=(begin, end)), 60)) == alone
    model.head.weight.data *= 0
    model.head.bias.data = torch.zeros(V)
    model.head.bias.data[end] = 2.0
    read: list[list[int]] = []
    forward = model.forward

    def noted(tokens: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        if states is None:
            read.append([])
        read[-1] += tokens.flatten().tolist()
        return forward(tokens, states)

    model.forward = noted  # type: ignore[method-assign]
    sampled = list(islice(generate(model, [begin, 5], sentence=(begin, end)), 40))
    assert sampled.count(end) > 5
    assert all(sentence[0] == begin and end not in sentence for sentence in read)
    assert [i for sentence in read for i in [*sentence[1:], end]][1 : len(sampled)] == sampled[:-1]


class Fixed(LanguageModel):
    """Has the same logits for every text."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__(Model(width=2, layers=1), len(probabilities))
        self.logits = torch.tensor(probabilities).log()

    def forward(self, tokens: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        return self.logits.expand(*tokens.shape, -1), []


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, {0: 0.5, 1: 0.05, 2: 0.3, 3: 0.15}),
        ({"top_k": 2}, {0: 0.625, 2: 0.375}),
        ({"top_k": 9}, {0: 0.5, 1: 0.05, 2: 0.3, 3: 0.15}),
        ({"top_p": 0.5}, {0: 1.0}),
        ({"top_p": 0.51}, {0: 0.625, 2: 0.375}),
        ({"top_p": 0.9}, {0: 0.526, 2: 0.316, 3: 0.158}),
        ({"temperature": 0.5}, {0: 0.685, 1: 0.007, 2: 0.247, 3: 0.062}),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.7}, {0: 0.735, 2: 0.265}),
        ({"temperature": 1e-4}, {0: 1.0}),
    ],
)
def test_top_k_and_top_p(options: dict[str, float], left: dict[int, float]) -> None:
    count = 4000
    sample = list(islice(generate(Fixed([0.5, 0.05, 0.3, 0.15]), [0], **options), count))  # type: ignore[arg-type]
    assert set(sample) == set(left)
    for token, probability in left.items():
        assert sample.count(token) / count == pytest.approx(probability, abs=0.03)


def test_generate_from_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        assert cli.main(["generate", str(run), "--prompt=the cat", "--tokens=30", f"--seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the cat") and len(text) == len("the cat") + 30 + 1 for text in texts)


@pytest.mark.parametrize(
    "tokens", ["--data.tokens=char", "--data.tokens=byte", "--data.tokens=word", "--data.tokens=word --data.eos=false"]
)
@pytest.mark.parametrize("end", ["\n", " "])
def test_a_prompt_is_not_needed_whatever_the_tokens(
    tokens: str, end: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(f"one two two three{end}" * 500)
    words = [*flags, f"--data.path={tmp_path / 'a.txt'}", *tokens.split(), "--train.steps=1", "--train.evaluations=1"]
    assert cli.main(["train", "--brief", *words, f"--run.dir={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    assert cli.main(["generate", str(tmp_path / "run"), "--tokens=3"]) == 0
