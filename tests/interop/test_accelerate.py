"""Accelerate: its prepared model, and the hooks that replace a layer's forward."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
accelerate = pytest.importorskip("accelerate", reason="run `make interop`")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model(compare, counter, signs, tmp_path, precision):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    data = DataLoader(TensorDataset(*signs), batch_size=32, shuffle=True)

    def fit(swapped):
        model, losses = counter(), []
        if swapped:
            sf.swap(model)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        model, optimizer, loader = accelerator.prepare(model, optimizer, data)
        for _ in range(6):
            for x, y in loader:
                loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                losses.append(float(loss.detach()))
        # In bf16 the paths differ from one another, and the run amplifies it: the first steps are compared.
        return losses if precision == "no" else losses[:4], model

    rtol = 2e-3 if precision == "no" else 2e-2
    _, model = compare("accelerate", f"GRU, mixed precision {precision}", "15x32x16", fit, rtol=rtol)
    model = accelerator.unwrap_model(model)
    assert model.accuracy(*signs) > 0.9
    accelerator.save_model(sf.restore(model), tmp_path)
    plain = counter()
    accelerate.load_checkpoint_in_model(plain, str(tmp_path))
    assert plain.accuracy(*signs) > 0.9


def test_a_layer_with_a_hook_is_left_unchanged(counter):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = counter()
    add_hook_to_module(model.recurrent, ModelHook())
    with pytest.warns(UserWarning, match="swap changed nothing"):
        report = sf.swap(model)
    assert "replaced on the object" in report.kept["recurrent"]
    remove_hook_from_module(model.recurrent)
    # Its removal leaves the original forward on the object.
    assert "forward" in vars(model.recurrent)
    assert list(sf.swap(model).swapped) == ["recurrent"]
    add_hook_to_module(model.recurrent, ModelHook())
    with pytest.warns(UserWarning, match="restore left recurrent"):
        sf.restore(model)
    remove_hook_from_module(model.recurrent)
    assert type(sf.restore(model).recurrent) is nn.GRU
