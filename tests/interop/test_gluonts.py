"""gluonts: DeepAR, whose training loop is Lightning's."""

import tempfile
from pathlib import Path

import pytest
import torch

import statefeed as sf

# Warnings of the package are not ours to repair.
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]


def test_deepar_forecasts_a_sine():
    """gluonts: DeepAR, whose training loop is Lightning's; swapped between building the network and training it."""
    pytest.importorskip("gluonts.torch", reason="run `make interop`")
    import numpy as np
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator

    class Estimator(DeepAREstimator):
        def create_lightning_module(self):
            module = super().create_lightning_module()
            reports.append(sf.swap(module, feedback="dsf"))
            return module

    reports = []
    steps = np.arange(400)
    series = np.sin(2 * np.pi * steps / 24) + 0.05 * np.random.default_rng(0).standard_normal(400) + 2
    start = pd.Period("2024-01-01", freq="h")
    data = ListDataset([{"start": start, "target": series[:-24]}], freq="h")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        estimator = Estimator(
            freq="h",
            prediction_length=24,
            context_length=48,
            hidden_size=24,
            lr=1e-2,
            num_batches_per_epoch=20,
            trainer_kwargs={"max_epochs": 4, "accelerator": "cpu", "logger": False, "default_root_dir": folder},
        )
        (forecast,) = estimator.train(data).predict(data)
    assert [list(report.swapped) for report in reports] == [["model.rnn"]]
    error = float(np.abs(forecast.mean - series[-24:]).mean())
    flat = float(np.abs(series[:-24].mean() - series[-24:]).mean())
    print(f"mean absolute error over a day: {error:.2f}, of the mean {flat:.2f}")
    assert error < 0.5 * flat


def test_the_callback_gives_the_same_losses(compare, losses_callback):
    pytest.importorskip("gluonts.torch", reason="run `make interop`")
    import lightning.pytorch as lightning
    import numpy as np
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.model.predictor import Predictor
    from gluonts.torch import DeepAREstimator

    from statefeed.integrations.lightning import SwapCallback

    target = np.sin(2 * np.pi * np.arange(400) / 24) + 2
    data = ListDataset([{"start": pd.Period("2024-01-01", freq="h"), "target": target}], freq="h")

    def fit(swapped):
        callback, losses = SwapCallback(), losses_callback(lightning.Callback)
        with tempfile.TemporaryDirectory() as folder:
            estimator = DeepAREstimator(
                freq="h",
                prediction_length=24,
                context_length=48,
                hidden_size=32,
                num_batches_per_epoch=10,
                trainer_kwargs={
                    "max_epochs": 1,
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_progress_bar": False,
                    "default_root_dir": folder,
                    "callbacks": [*[callback] * swapped, losses],
                },
            )
            predictor = estimator.train(data)
        return losses.losses, (callback, predictor)

    _, (callback, predictor) = compare("gluonts", "DeepAR, LSTM, 2 layers", "72x32x32", fit)
    assert list(callback.report.swapped) == ["model.rnn"]
    # The weights of the best checkpoint are loaded in place; a predictor that is read from a folder is built again.
    assert type(predictor.prediction_net.model.rnn) is sf.LSTM
    with tempfile.TemporaryDirectory() as folder:
        predictor.serialize(Path(folder))
        loaded = Predictor.deserialize(Path(folder))
    assert type(loaded.prediction_net.model.rnn) is torch.nn.LSTM
    assert type(sf.restore(predictor.prediction_net).model.rnn) is torch.nn.LSTM
    forecasts = []
    for p in (predictor, loaded):
        torch.manual_seed(0)
        (forecast,) = p.predict(data)
        forecasts.append(torch.tensor(forecast.mean))
    torch.testing.assert_close(*forecasts)
