"""Scores: against the definition, against the run's own record, and on a model made of plain torch.nn layers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from statefeed.lm import cli
from statefeed.lm.config import Model, UsageError
from statefeed.lm.data import corpora
from statefeed.lm.data.batches import Stream
from statefeed.lm.model import LanguageModel
from statefeed.lm.run import folder as run_folder
from statefeed.lm.run.evaluate import score


@pytest.mark.parametrize("batch", [1, 3])
def test_score_against_its_definition(batch: int) -> None:
    torch.manual_seed(0)
    model = LanguageModel(Model(width=8, cell="lstm", dropout=0.5), 11)
    tokens = torch.randint(11, (40,))
    found = score(model, Stream(tokens.int().numpy(), batch, context=7, drop_last=False), size=60)
    assert model.training
    model.eval()
    rows = math.ceil(39 / batch)
    total = 0.0
    for column in range(batch):
        part = tokens[column * rows : min((column + 1) * rows, 39) + 1]
        logits, _ = model(part[:-1].unsqueeze(1))
        total += F.cross_entropy(logits.squeeze(1), part[1:], reduction="sum").item()
    assert found.tokens == 39
    assert found.loss == pytest.approx(total / 39, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / 39), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / 39 / math.log(2) * 40 / 60, rel=1e-5)


class Plain(nn.Module):
    """The language model written with torch.nn alone."""

    def __init__(self, types: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(types, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({"rnn": nn.GRU(width, width)}) for _ in range(layers))
        self.head = nn.Linear(width, types)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block["rnn"](x)[0]  # type: ignore[index, operator]
        return self.head(x)  # type: ignore[no-any-return]


def test_trained_weights_in_plain_torch_layers_have_the_same_perplexity(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = run_folder.load(run)
    corpus = corpora.read(loaded.config.data)
    plain = Plain(loaded.tokenizer.size, loaded.config.model.width, loaded.config.model.layers)
    plain.load_state_dict(load_file(run / "weights.safetensors"))
    ids = torch.from_numpy(loaded.tokenizer.encode(corpus.splits["test"])).long().unsqueeze(1)
    with torch.no_grad():
        loss = F.cross_entropy(plain(ids[:-1]).squeeze(1), ids[1:, 0]).item()
    ours = score(loaded.model, Stream(ids[:, 0].int().numpy(), 1, 10**6, drop_last=False), corpus.sizes["test"])
    assert ours.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluate_repeats_what_training_recorded(run: Path, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), f"--split={split}"]) == 0
    out = capsys.readouterr().out
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    row = min((row for row in metrics if row["split"] == split), key=lambda row: row["loss"])
    assert out == (
        f"{split}: loss {row['loss']:.4f} nats per token, perplexity {row['perplexity']:.2f}, "
        f"{row['bits_per_byte']:.3f} bits per byte\n"
    )


def test_a_changed_text_raises(
    flags: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = tmp_path / "story.txt"
    story.write_bytes(text.read_bytes())
    assert cli.main(["train", *flags, f"--data.path={story}", f"--run.dir={tmp_path / 'run'}"]) == 0
    story.write_bytes(text.read_bytes()[:-40])
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--split=test"]) == 2
    err = capsys.readouterr().err
    assert "the test split of story.txt is not the text of the run: expected sha256" in err
    assert err.count("\n") == 1


def test_one_token_has_no_score() -> None:
    with pytest.raises(UsageError, match="at least 2 tokens to be scored, got 1"):
        score(LanguageModel(Model(width=8), 11), Stream(np.array([3], np.int32), 2, 3, drop_last=False), 4)
