"""flair: a sequence tagger, whose LSTM reads packed sentences."""

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
flair = pytest.importorskip("flair", reason="run `make interop`")

WORDS = {"Anna": "PER", "Bert": "PER", "Paris": "LOC", "Rome": "LOC", "saw": "O", "left": "O", "and": "O"}


@pytest.fixture
def sentences():
    from flair.data import Sentence

    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(64):
        length = int(torch.randint(3, 15, (), generator=generator))
        words = [list(WORDS)[int(k)] for k in torch.randint(0, len(WORDS), (length,), generator=generator)]
        sentence = Sentence(words)
        for token in sentence:
            token.set_label("ner", WORDS[token.text])
        found.append(sentence)
    return found


def clear(sentences):
    """Forget the embeddings, which flair stores on the words with the graph that they come from."""
    for sentence in sentences:
        sentence.clear_embeddings()


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_tagger(compare, sentences, tmp_path, cell):
    from flair.data import Dictionary
    from flair.embeddings import OneHotEmbeddings
    from flair.models import SequenceTagger

    def fit(swapped):
        vocabulary, tags = Dictionary(add_unk=True), Dictionary(add_unk=False)
        for word, tag in WORDS.items():
            vocabulary.add_item(word)
            tags.add_item(tag)
        model = SequenceTagger(
            OneHotEmbeddings(vocabulary, embedding_length=16),
            tags,
            "ner",
            hidden_size=32,
            rnn_layers=2,
            rnn_type=cell,
            use_crf=True,
        )
        if swapped:
            assert list(sf.swap(model).swapped) == ["rnn"]
        optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
        for step in range(20):
            start = step * 16 % 64
            loss, count = model.forward_loss(sentences[start : start + 16])
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
            losses.append(float(loss.detach()) / count)
            clear(sentences)
        return losses, model

    _, model = compare("flair", f"SequenceTagger {cell}, 2 layers, bidirectional", "15x16x32 packed", fit)
    assert type(model.rnn) is getattr(sf, cell)
    model.save(tmp_path / "model.pt")
    loaded = SequenceTagger.load(tmp_path / "model.pt")
    assert type(loaded.rnn) is getattr(nn, cell)
    for m in (model, loaded):
        m.eval()
    with torch.no_grad():
        expected = model.forward_loss(sentences[:8])[0]
        clear(sentences)
        # The loss of the CRF is a difference of scores of more than a hundred, with a spacing of 1.5e-5.
        torch.testing.assert_close(loaded.forward_loss(sentences[:8])[0], expected, rtol=1e-4, atol=0)
        clear(sentences)
        assert type(sf.restore(model).rnn) is getattr(nn, cell)
        torch.testing.assert_close(model.forward_loss(sentences[:8])[0], expected, rtol=1e-4, atol=0)
