"""demucs: a model of audio source separation, with a bidirectional LSTM."""

import copy

import pytest
import torch

import statefeed as sf

# Warnings of the package are not ours to repair.
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]


def test_demucs_separates_two_tones():
    """demucs, a model of audio source separation: its bidirectional LSTM, in training and restored."""
    demucs = pytest.importorskip("demucs.demucs", reason="run `make interop`")
    torch.manual_seed(0)
    model = demucs.Demucs(["low", "high"], audio_channels=1, channels=8, depth=3, lstm_layers=2, dconv_mode=0)
    plain = copy.deepcopy(model).eval()
    report = sf.swap(model, feedback="dsf")
    assert list(report.swapped) == ["lstm.lstm"]

    t = torch.arange(2048) / 8000

    def tones(B):
        phase = 6.3 * torch.rand(2, B, 1)
        frequency = torch.tensor([200.0, 1500.0])[:, None, None] * (0.9 + 0.2 * torch.rand(2, B, 1))
        sources = torch.sin(6.2832 * frequency * t + phase).transpose(0, 1)[:, :, None]
        return sources.sum(1), sources

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        mixture, sources = tones(4)
        loss = (model(mixture) - sources).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"mean squared error: {losses[0]:.3f}, then {losses[-1]:.3f}")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

    plain.load_state_dict(model.state_dict())
    mixture, _ = tones(2)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(mixture), plain(mixture))


def test_exact_gradients_give_the_same_losses(compare):
    demucs = pytest.importorskip("demucs.demucs", reason="run `make interop`")
    from demucs.states import copy_state

    def fit(swapped):
        model = demucs.Demucs(["low", "high"], audio_channels=1, channels=16, depth=3, lstm_layers=2, dconv_mode=0)
        if swapped:
            sf.swap(model)
        optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
        for _ in range(8):
            sources = torch.randn(4, 2, 1, 4096)
            loss = (model(sources.sum(1)) - sources).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, model

    plain, model = compare("demucs", "Demucs, LSTM, 2 layers, bidirectional", "64x4x64", fit)
    assert type(model.lstm.lstm) is sf.LSTM
    plain.load_state_dict(copy_state(model.state_dict()))
    assert type(sf.restore(model).lstm.lstm) is torch.nn.LSTM
    x = torch.randn(1, 1, 4096)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))
