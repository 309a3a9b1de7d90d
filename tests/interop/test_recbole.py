"""recbole: GRU4Rec on sessions, trained and saved by the package's own trainer."""

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
recbole = pytest.importorskip("recbole", reason="run `make interop`")


@pytest.fixture
def config(tmp_path):
    from recbole.config import Config

    folder = tmp_path / "sessions"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(40):
        item = int(torch.randint(0, 30, (), generator=generator))
        for step in range(20):
            rows.append(f"u{user}\ti{item}\t{step}")
            item = (item + int(torch.randint(1, 3, (), generator=generator))) % 30
    (folder / "sessions.inter").write_text("\n".join(rows))
    return Config(
        model="GRU4Rec",
        dataset="sessions",
        config_dict={
            "data_path": str(tmp_path),
            "checkpoint_dir": str(tmp_path / "saved"),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "epochs": 3,
            "train_batch_size": 64,
            "train_neg_sample_args": None,
            "hidden_size": 32,
            "embedding_size": 16,
            "num_layers": 1,
            "MAX_ITEM_LIST_LENGTH": 20,
            "use_gpu": False,
            "show_progress": False,
            "state": "ERROR",
        },
    )


def test_gru4rec(compare, config):
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import GRU4Rec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    def fit(swapped):
        init_seed(0, True)
        train, _, _ = data_preparation(config, create_dataset(config))
        model = GRU4Rec(config, train.dataset)
        if swapped:
            assert list(sf.swap(model).swapped) == ["gru_layers"]
        trainer = Trainer(config, model)
        trainer.fit(train, saved=True, show_progress=False)
        return list(trainer.train_loss_dict.values()), (model, trainer)

    (plain, _), (model, trainer) = compare("recbole", "GRU4Rec", "20x64x32", fit)
    assert type(model.gru_layers) is sf.GRU
    state = torch.load(trainer.saved_model_file, weights_only=False)["state_dict"]
    plain.load_state_dict(state)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value)
    assert type(plain.gru_layers) is nn.GRU
    assert type(sf.restore(model).gru_layers) is nn.GRU
