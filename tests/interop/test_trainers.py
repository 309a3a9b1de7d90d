"""Recipes for other people's training loops: Lightning and Accelerate, with the layers and a schedule of rules."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]


class Counter(nn.Module):
    """Does a sequence of signs hold more ones than minus ones?  x (B, T, 1) -> (B,), a logit."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        y, _ = self.recurrent(x)
        return self.head(y[:, -1]).squeeze(-1)


@pytest.fixture
def data():
    torch.manual_seed(0)
    x = torch.randint(0, 2, (512, 15, 1)) * 2.0 - 1
    return DataLoader(TensorDataset(x, (x.sum((1, 2)) > 0).float()), batch_size=32, shuffle=True)


def accuracy(model, data):
    x, y = data.dataset.tensors
    with torch.no_grad():
        return float(((model(x) > 0) == y.bool()).float().mean())


def test_lightning(data, tmp_path):
    lightning = pytest.importorskip("lightning", reason="run `make interop`")

    class Credit(lightning.Callback):
        """That of the documentation."""

        def __init__(self, monitor, schedule):
            self.monitor, self.schedule = monitor, schedule

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.schedule.apply(module, trainer.global_step / trainer.estimated_stepping_batches)
            module.log_dict(self.monitor(module, trainer.global_step))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Counter()
            sf.swap(self.model, feedback="dsf")

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.binary_cross_entropy_with_logits(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    module, x, y = Module(), *data.dataset.tensors
    monitor = sf.Monitor(
        lambda m, b: nn.functional.binary_cross_entropy_with_logits(m.model(b[0]), b[1]), (x[:32], y[:32]), every=40
    )
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[Credit(monitor, sf.Schedule("dsf@0.5/gate+1"))],
    )
    trainer.fit(module, data)
    assert [step for step, _ in monitor.history] == [0, 40, 80]
    assert 0 < trainer.callback_metrics["alignment/cosine"] <= 1
    assert str(module.model.recurrent.feedback) == "gate+1"
    assert accuracy(module.model, data) > 0.9

    (checkpoint,) = tmp_path.rglob("*.ckpt")
    plain = Counter()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    plain.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    assert accuracy(plain, data) == accuracy(module.model, data)


def test_accelerate(data, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="run `make interop`")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = Counter()
    sf.swap(model, feedback="gate+1")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data)
    for _ in range(6):
        for x, y in loader:
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    assert accuracy(model, data) > 0.9

    accelerator.save_model(sf.restore(accelerator.unwrap_model(model)), tmp_path)
    plain = Counter()
    accelerate.load_checkpoint_in_model(plain, str(tmp_path))
    assert accuracy(plain, data) > 0.9
