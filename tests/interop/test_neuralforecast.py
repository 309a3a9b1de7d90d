"""neuralforecast: it trains a copy of the model, which the callback swaps; save and load."""

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
neuralforecast = pytest.importorskip("neuralforecast", reason="run `make interop`")


@pytest.fixture
def frame():
    import numpy as np
    import pandas as pd

    steps = np.arange(240)
    rows = [
        pd.DataFrame(
            {
                "unique_id": f"series {k}",
                "ds": pd.date_range("2024-01-01", periods=240, freq="h"),
                "y": np.sin(2 * np.pi * steps / 24 + k) + 0.05 * np.random.default_rng(k).standard_normal(240),
            }
        )
        for k in range(4)
    ]
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_a_forecaster(compare, frame, losses_callback, tmp_path, name):
    import pytorch_lightning
    from neuralforecast import models

    from statefeed.integrations.lightning import SwapCallback

    def fit(swapped):
        losses = losses_callback(pytorch_lightning.Callback)
        model = getattr(models, name)(
            h=12,
            input_size=48,
            encoder_n_layers=2,
            encoder_hidden_size=32,
            max_steps=20,
            batch_size=4,
            random_seed=0,
            accelerator="cpu",
            callbacks=[*[SwapCallback()] * swapped, losses],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        forecaster = neuralforecast.NeuralForecast(models=[model], freq="h")
        forecaster.fit(frame)
        # The trained copy has a copy of the callback too.
        return next(
            c.losses for c in forecaster.models[0].trainer_kwargs["callbacks"] if hasattr(c, "losses")
        ), forecaster

    _, forecaster = compare("neuralforecast", f"{name}, 2 layers", "60x4x32", fit)
    (model,) = forecaster.models
    kind = getattr(nn, name)
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    assert [type(m) for m in layers] == [getattr(sf, name)]
    forecast = forecaster.predict()[name].to_numpy()

    forecaster.save(str(tmp_path / "saved"), overwrite=True, save_dataset=True)
    loaded = neuralforecast.NeuralForecast.load(str(tmp_path / "saved"))
    assert [type(m) for m in loaded.models[0].modules() if isinstance(m, nn.RNNBase)] == [kind]
    torch.testing.assert_close(torch.tensor(loaded.predict()[name].to_numpy()), torch.tensor(forecast))

    sf.restore(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.RNNBase)] == [kind]
    torch.testing.assert_close(torch.tensor(forecaster.predict()[name].to_numpy()), torch.tensor(forecast))
