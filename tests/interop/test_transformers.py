"""Hugging Face Trainer: the callback, its schedule and monitor, and what save_model writes."""

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers", reason="run `make interop`")


@pytest.fixture
def fit(counter, signs, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.counter = counter()

        def forward(self, x, labels):
            logits = self.counter(x)
            return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, labels), "logits": logits}

    def fit(*callbacks, epochs=2):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=0.01,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"x": x, "labels": y} for x, y in zip(*signs, strict=True)]
        trainer = transformers.Trainer(Model(), arguments, train_dataset=rows, callbacks=list(callbacks))
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer

    return fit


def test_the_callback_gives_the_same_losses(fit, compare, counter, signs, tmp_path):
    from safetensors.torch import load_file

    from statefeed.integrations.transformers import SwapCallback

    _, trainer = compare("transformers", "GRU", "15x32x16", lambda swapped: fit(*[SwapCallback()] * swapped))
    model = trainer.model.counter
    assert type(model.recurrent) is sf.GRU
    trainer.save_model(str(tmp_path / "saved"))
    plain = counter()
    state = load_file(tmp_path / "saved" / "model.safetensors")
    plain.load_state_dict({name.removeprefix("counter."): value for name, value in state.items()})
    torch.testing.assert_close(plain(signs[0]), model(signs[0]))
    assert type(sf.restore(trainer.model).counter.recurrent) is nn.GRU
    torch.testing.assert_close(plain(signs[0]), model(signs[0]))


def test_schedule_and_monitor(fit, signs):
    from statefeed.integrations.transformers import SwapCallback

    batch = {"x": signs[0][:32], "labels": signs[1][:32]}
    monitor = sf.Monitor(lambda model, b: model(**b)["loss"], batch, every=40)
    callback = SwapCallback(schedule="dsf@0.5/gate+1", monitor=monitor)
    _, trainer = fit(callback, epochs=6)
    assert callback.report.ran() == {"counter.recurrent": True}
    assert [row["step"] for row in trainer.state.log_history if "alignment/cosine" in row] == [0, 40, 80]
    assert str(trainer.model.counter.recurrent.feedback) == "gate+1"
    assert trainer.model.counter.accuracy(*signs) > 0.9
