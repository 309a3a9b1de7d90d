"""Lightning: the callback, its schedule and monitor, and what a checkpoint holds."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
lightning = pytest.importorskip("lightning", reason="run `make interop`")
cross_entropy = nn.functional.binary_cross_entropy_with_logits


@pytest.fixture
def fit(counter, signs, tmp_path, losses_callback):
    class Module(lightning.LightningModule):
        def configure_model(self):
            # Built late, so that no line of the user's reaches it before the callback does.
            if not hasattr(self, "model"):
                self.model = counter()

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    def fit(*callbacks, epochs=6, module=None, **options):
        losses, module = losses_callback(lightning.Callback), module or Module()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, losses],
        )
        trainer.fit(module, DataLoader(TensorDataset(*signs), batch_size=32, shuffle=True), **options)
        return losses.losses, (trainer, module)

    return fit


def test_the_callback_gives_the_same_losses(fit, compare, signs, counter, tmp_path):
    from statefeed.integrations.lightning import SwapCallback

    _, (_, module) = compare("lightning", "GRU", "15x32x16", lambda swapped: fit(*[SwapCallback()] * swapped, epochs=2))
    assert type(module.model.recurrent) is sf.GRU
    checkpoint = sorted(tmp_path.rglob("*.ckpt"))[-1]
    plain = counter()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    plain.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    torch.testing.assert_close(plain(signs[0]), module.model(signs[0]))
    assert type(sf.restore(module).model.recurrent) is nn.GRU
    torch.testing.assert_close(plain(signs[0]), module.model(signs[0]))


def test_a_run_resumed_from_a_checkpoint_is_swapped_again(fit, tmp_path):
    from statefeed.integrations.lightning import SwapCallback

    _, (trainer, _) = fit(SwapCallback("dsf"), epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, (_, module) = fit(SwapCallback("dsf"), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert str(module.model.recurrent.feedback) == "dsf"


def test_schedule_and_monitor(fit, signs):
    from statefeed.integrations.lightning import SwapCallback

    x, y = signs
    monitor = sf.Monitor(lambda m, b: cross_entropy(m.model(b[0]), b[1]), (x[:32], y[:32]), every=40)
    callback = SwapCallback(schedule="dsf@0.5/gate+1", monitor=monitor)
    _, (trainer, module) = fit(callback)
    assert callback.report.ran() == {"model.recurrent": True}
    assert [step for step, _ in monitor.history] == [0, 40, 80]
    assert 0 < trainer.callback_metrics["alignment/cosine"] <= 1
    assert str(module.model.recurrent.feedback) == "gate+1"
    assert module.model.accuracy(x, y) > 0.9
