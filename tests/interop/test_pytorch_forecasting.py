"""pytorch-forecasting: its layers are subclasses of torch's, and stay instances of them."""

import pytest
import torch

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
pytorch_forecasting = pytest.importorskip("pytorch_forecasting", reason="run `make interop`")


@pytest.fixture
def data():
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    steps = np.arange(120)
    frame = pd.concat(
        [pd.DataFrame({"t": steps, "y": np.sin(2 * np.pi * steps / 24 + k) + 2, "series": str(k)}) for k in range(3)],
        ignore_index=True,
    )
    return TimeSeriesDataSet(
        frame,
        time_idx="t",
        target="y",
        group_ids=["series"],
        min_encoder_length=30,
        max_encoder_length=30,
        max_prediction_length=6,
        time_varying_unknown_reals=["y"],
    )


@pytest.mark.parametrize(
    ("name", "cell"), [("RecurrentNetwork", "GRU"), ("RecurrentNetwork", "LSTM"), ("DeepAR", "LSTM")]
)
def test_a_forecaster(compare, data, losses_callback, tmp_path, name, cell):
    import lightning.pytorch as lightning
    from pytorch_forecasting.models.nn import rnn

    from statefeed.integrations.lightning import SwapCallback

    theirs = getattr(rnn, cell)

    def fit(swapped):
        network = getattr(pytorch_forecasting, name)
        model = network.from_dataset(data, cell_type=cell, hidden_size=32, rnn_layers=2, learning_rate=1e-2)
        losses = losses_callback(lightning.Callback)
        trainer = lightning.Trainer(
            max_epochs=1,
            limit_train_batches=12,
            accelerator="cpu",
            gradient_clip_val=0.1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[*[SwapCallback()] * swapped, losses],
        )
        trainer.fit(model, data.to_dataloader(train=True, batch_size=16, num_workers=0))
        return losses.losses, (model, trainer)

    _, (model, trainer) = compare("pytorch-forecasting", f"{name} {cell}, 2 layers", "36x16x32", fit)
    assert isinstance(model.rnn, theirs)
    assert isinstance(model.rnn, getattr(sf, cell))

    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    assert type(loaded.rnn) is theirs
    x, _ = next(iter(data.to_dataloader(train=False, batch_size=4, num_workers=0)))
    for m in (model, loaded):
        m.eval()
    # In training mode of the data module DeepAR samples; the encoder alone is deterministic.
    for ours, plain in zip(model.encode(x), loaded.encode(x), strict=True):
        torch.testing.assert_close(ours, plain)
    assert type(sf.restore(model).rnn) is theirs
