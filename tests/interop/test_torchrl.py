"""torchrl: recurrent modules inside a policy, a loss that hides its networks, and the backends of its own."""

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
torchrl = pytest.importorskip("torchrl", reason="run `make interop`")


def network(cell, **options):
    """Observations (B, T, 4) to a value of each of two actions, through one recurrent layer."""
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.modules import GRUModule, LSTMModule

    kind = {"GRU": GRUModule, "LSTM": LSTMModule}[cell]
    states = ["state"] if cell == "GRU" else ["state", "cell_state"]
    recurrent = kind(
        input_size=4,
        hidden_size=32,
        in_keys=["observation", *states],
        out_keys=["features", *[("next", state) for state in states]],
        **options,
    )
    head = TensorDictModule(nn.Linear(32, 2), in_keys=["features"], out_keys=["action_value"])
    return TensorDictSequential(recurrent, head)


def batch(cell, size=8, steps=20):
    from tensordict import TensorDict

    generator = torch.Generator().manual_seed(1)
    shape = (size, steps)
    is_init = torch.zeros(*shape, 1, dtype=torch.bool)
    is_init[:, 0] = True
    is_init[::2, steps // 2] = True  # a second episode in every other row
    states = {"state": torch.zeros(*shape, 1, 32), "cell_state": torch.zeros(*shape, 1, 32)}
    return TensorDict(
        {
            "observation": torch.randn(*shape, 4, generator=generator),
            "target": torch.randn(*shape, 2, generator=generator),
            "is_init": is_init,
            **{name: states[name] for name in (("state",) if cell == "GRU" else ("state", "cell_state"))},
        },
        batch_size=shape,
    )


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_a_recurrent_module(compare, tmp_path, cell):
    from torchrl.modules import set_recurrent_mode

    data = batch(cell)

    def fit(swapped):
        model, losses = network(cell), []
        if swapped:
            assert len(sf.swap(model).swapped) == 1
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(20):
            with set_recurrent_mode(True):
                loss = (model(data.clone())["action_value"] - data["target"]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, model

    plain, model = compare("torchrl", f"{cell}Module", "20x8x32", fit)
    assert type(getattr(model[0], cell.lower())) is getattr(sf, cell)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with set_recurrent_mode(True), torch.no_grad():
        torch.testing.assert_close(model(data.clone())["action_value"], plain(data.clone())["action_value"])
    assert type(getattr(sf.restore(model)[0], cell.lower())) is getattr(nn, cell)


def test_a_module_with_a_backend_of_its_own_is_in_the_report():
    try:
        model = network("LSTM", recurrent_backend="scan")
    except ImportError as error:
        pytest.skip(str(error))
    assert "recurrent_backend" in sf.swap(model).outside["module.0"]


def test_their_python_lstm_is_left_unchanged_with_the_reason():
    from torchrl.modules import LSTM

    model = nn.ModuleList([LSTM(4, 8, batch_first=True), nn.LSTM(4, 8)])
    report = sf.swap(model)
    assert "0" in report.kept
    assert list(report.swapped) == ["1"]


def test_a_loss_that_hides_its_network_names_it():
    from torchrl.data import OneHot
    from torchrl.modules import QValueActor
    from torchrl.objectives import DQNLoss

    class Values(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.gru(x)[0])

    actor = QValueActor(Values(), in_keys=["observation"], spec=OneHot(2))
    loss = DQNLoss(actor, action_space="one-hot")
    with pytest.warns(UserWarning, match="swap changed nothing"):
        report = sf.swap(loss)
    assert "value_network" in report.outside
    assert list(sf.swap(loss.value_network).swapped) == ["module.0.module.gru"]
