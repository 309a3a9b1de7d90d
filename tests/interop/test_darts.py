"""darts: recurrent forecasters whose network is built as fitting starts; the callback, save and load."""

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
darts_models = pytest.importorskip("darts.models", reason="run `make interop`")
pytorch_lightning = pytest.importorskip("pytorch_lightning", reason="run `make interop`")


class Losses(pytorch_lightning.Callback):
    """Keeps the loss of every step; a class with a name, because darts pickles the callbacks with the model."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(float(outputs["loss"]))


@pytest.fixture
def series():
    import numpy as np
    import pandas as pd
    from darts import TimeSeries

    steps = np.arange(300)
    values = np.sin(2 * np.pi * steps / 24) + 0.05 * np.random.default_rng(0).standard_normal(300)
    return TimeSeries.from_times_and_values(
        pd.date_range("2024-01-01", periods=300, freq="h"), values.astype("float32")
    )


def build(name, cell, callbacks):
    options = {"RNNModel": {"training_length": 48}, "BlockRNNModel": {"output_chunk_length": 12}}[name]
    return getattr(darts_models, name)(
        input_chunk_length=36,
        model=cell,
        hidden_dim=32,
        batch_size=16,
        n_epochs=2,
        random_state=0,
        pl_trainer_kwargs={
            "accelerator": "cpu",
            "callbacks": callbacks,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        },
        **options,
    )


@pytest.mark.parametrize(("name", "cell"), [("RNNModel", "GRU"), ("RNNModel", "LSTM"), ("BlockRNNModel", "RNN")])
def test_a_forecaster(compare, series, tmp_path, name, cell):
    from darts.utils.serialization import safe_globals

    from statefeed.integrations.lightning import SwapCallback

    def fit(swapped):
        losses = Losses()
        model = build(name, cell, [*[SwapCallback()] * swapped, losses])
        model.fit(series)
        return losses.losses, model

    _, model = compare("darts", f"{name} {cell}", "48x16x32", fit)
    kind = getattr(nn, cell)
    assert type(model.model.rnn) is getattr(sf, cell)
    forecast = model.predict(12, series=series).values()

    # Loading builds plain layers; fitting on swaps them again, because the callback is saved with the model.
    model.save(str(tmp_path / "model.pt"))
    with safe_globals([SwapCallback, Losses]):
        loaded = getattr(darts_models, name).load(str(tmp_path / "model.pt"))
    assert type(loaded.model.rnn) is kind
    torch.testing.assert_close(torch.tensor(loaded.predict(12, series=series).values()), torch.tensor(forecast))
    loaded.fit(series, epochs=1)
    assert type(loaded.model.rnn) is getattr(sf, cell)

    assert type(sf.restore(model.model).rnn) is kind
    torch.testing.assert_close(torch.tensor(model.predict(12, series=series).values()), torch.tensor(forecast))
