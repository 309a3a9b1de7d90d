"""speechbrain: its recurrent blocks and its Brain class, which trains them and saves checkpoints."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
try:
    speechbrain = pytest.importorskip("speechbrain", reason="run `make interop`")
except OSError as error:
    # PyPI has torchaudio for CUDA only, and speechbrain imports it.
    pytest.skip(
        f"torchaudio cannot be loaded beside a CPU torch ({error}); its CPU build is at "
        "https://download.pytorch.org/whl/cpu, in PIP_EXTRA_INDEX_URL",
        allow_module_level=True,
    )


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_a_brain(compare, tmp_path, cell):
    from speechbrain.nnet import RNN
    from speechbrain.utils.checkpoints import Checkpointer

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 16, 40, 20, generator=generator)
    lengths = 0.5 + 0.5 * torch.rand(8, 16, generator=generator)
    batches = [(x[k], lengths[k], x[k].cumsum(1)[..., :1].tanh()) for k in range(8)]

    class Brain(speechbrain.Brain):
        def compute_forward(self, batch, stage):
            y, _ = self.modules.recurrent(batch[0], lengths=batch[1])
            return self.modules.head(y)

        def compute_objectives(self, predictions, batch, stage):
            loss = (predictions - batch[2][:, : predictions.shape[1]]).square().mean()
            self.losses.append(float(loss.detach()))
            return loss

    def fit(swapped):
        recurrent = getattr(RNN, cell)(32, input_shape=(16, 40, 20), num_layers=2, bidirectional=True)
        modules = {"recurrent": recurrent, "head": nn.Linear(64, 1)}
        brain = Brain(modules, lambda parameters: torch.optim.Adam(parameters, 0.01), run_opts={"device": "cpu"})
        brain.losses = []
        if swapped:
            assert list(sf.swap(brain.modules).swapped) == ["recurrent.rnn"]
        brain.fit(range(2), DataLoader(batches, batch_size=None), progressbar=False)
        return brain.losses, brain

    plain, brain = compare("speechbrain", f"{cell}, 2 layers, bidirectional", "40x16x32 packed", fit)
    assert type(brain.modules.recurrent.rnn) is getattr(sf, cell)
    Checkpointer(tmp_path, {"modules": brain.modules}).save_checkpoint()
    Checkpointer(tmp_path, {"modules": plain.modules}).recover_if_possible()
    for b in (brain, plain):
        b.modules.eval()
    with torch.no_grad():
        expected = brain.compute_forward(batches[0], None)
        torch.testing.assert_close(plain.compute_forward(batches[0], None), expected)
        assert type(sf.restore(brain.modules).recurrent.rnn) is getattr(nn, cell)
        torch.testing.assert_close(brain.compute_forward(batches[0], None), expected)
