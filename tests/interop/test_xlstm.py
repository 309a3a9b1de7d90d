"""xlstm: its sLSTM cell, in float64 and without CUDA, is the independent truth of SLSTM."""

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
xlstm = pytest.importorskip("xlstm", reason="run `make interop`")
from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig  # noqa: E402

I, H, B = 3, 8, 2


def cell_of(heads, **options):
    """The package's cell with the vanilla backend, random weights, and W in front of it."""
    torch.manual_seed(0)
    made = sLSTMCell(sLSTMCellConfig(hidden_size=H, num_heads=heads, backend="vanilla", **options)).double()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.5)
    return made, torch.randn(4 * H, I, dtype=torch.float64)


def weights_of(cell, W):
    return {"W": W, "R": cell._recurrent_kernel_.detach(), "b": cell._bias_.detach()}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("T", [1, 2, 7, 50, 200])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_outputs_states_and_gradients_agree(heads, T, started):
    cell, W = cell_of(heads)
    layer = sf.SLSTM(I, H, num_heads=heads, batch_first=True, dtype=torch.float64).from_xlstm(weights_of(cell, W))
    W.requires_grad_()
    x, other_x = (torch.randn(B, T, I, generator=torch.Generator().manual_seed(1)).double() for _ in range(2))
    state = torch.randn(4, B, H, generator=torch.Generator().manual_seed(2)).double()
    state[2] = state[2].abs() + 0.5
    states = [state.clone().requires_grad_() if started else None for _ in range(2)]

    expected, last = cell(x.requires_grad_() @ W.T, states[0])
    expected = expected.transpose(1, 2).flatten(2)  # (B, heads, T, H / heads)
    hx = None if states[1] is None else tuple(s[None] for s in states[1])
    y, final = layer(other_x.requires_grad_(), hx)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(final), last, rtol=1e-12, atol=1e-12)

    # A loss on h alone: the package differentiates through m, which h does not depend on.
    e = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).double()
    (expected * e).sum().backward()
    (y * e).sum().backward()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(weight.grad)
    found = layer.to_xlstm()
    torch.testing.assert_close(other_x.grad, x.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found["W"], W.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found["R"], cell._recurrent_kernel_.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.bias_ih_l0, cell._bias_.grad, rtol=1e-9, atol=1e-11)
    if started:  # the package's m is an input like another
        torch.testing.assert_close(states[1].grad[:3], states[0].grad[:3], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_comparison_finds_a_wrong_order_of_heads_and_gates(heads):
    cell, W = cell_of(heads)
    weights = weights_of(cell, W)
    x = torch.randn(B, 7, I).double()
    expected = cell(x @ W.T)[0].transpose(1, 2).flatten(2)
    right = sf.SLSTM(I, H, num_heads=heads, batch_first=True, dtype=torch.float64).from_xlstm(weights)
    torch.testing.assert_close(right(x)[0], expected)
    for wrong in (
        weights | {"R": weights["R"].flip(0)},
        weights | {"R": weights["R"].roll(H // heads, 1)},
        weights | {"R": weights["R"].unflatten(1, (4, -1)).mT.flatten(1, 2)},
    ):
        if not torch.equal(wrong["R"], weights["R"]):
            assert not torch.allclose(right.from_xlstm(wrong)(x)[0], expected, atol=1e-2)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_initial_values_are_the_packages(heads):
    """The block of a stack is the layer of SLSTM; the package's default of W is that of its layer, not of the cell."""
    layer = sf.SLSTM(H, H, 3, num_heads=heads)
    for block in range(3):
        config = sLSTMCellConfig(hidden_size=H, num_heads=heads, backend="vanilla", _block_idx=block, _num_blocks=3)
        found, cell = layer.to_xlstm(block), sLSTMCell(config)
        torch.testing.assert_close(found["R"], cell._recurrent_kernel_.detach())
        torch.testing.assert_close(found["b"], cell._bias_.detach())


# Swapped in a stack of blocks -----------------------------------------------------------------------------------------


def stack(dtype=torch.float64, heads=2, width=16):
    """Two sLSTM blocks: norm, convolution, input maps per head, cell, norm over heads, gated MLP."""
    layer = xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=heads, dtype="float32")
    block = xlstm.sLSTMBlockConfig(slstm=layer, feedforward=xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"))
    config = xlstm.xLSTMBlockStackConfig(
        slstm_block=block, context_length=32, num_blocks=2, embedding_dim=width, slstm_at="all"
    )
    made = xlstm.xLSTMBlockStack(config).to(dtype)
    for name, weight in made.named_parameters():
        if "_recurrent_kernel_" in name:
            nn.init.normal_(weight, std=0.5)
    return made


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), **{name: weight.grad.clone() for name, weight in model.named_parameters()}}


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_swapped_cell_in_its_block(heads):
    torch.manual_seed(0)
    model, x = stack(heads=heads), torch.randn(3, 20, 16, dtype=torch.float64)
    before, names = gradients(model, x), list(model.state_dict())
    plain = type(model.blocks[0].xlstm.slstm_cell)
    report = sf.swap(model)
    assert list(report.swapped) == ["blocks.0.xlstm.slstm_cell", "blocks.1.xlstm.slstm_cell"]
    cell = model.blocks[0].xlstm.slstm_cell
    assert isinstance(cell, plain)
    assert isinstance(cell, sf.FeedbackLayer)
    assert "feedback='bptt'" in repr(cell)
    torch.testing.assert_close(gradients(model, x), before, rtol=1e-9, atol=1e-10)
    assert all(report.ran().values())

    assert list(model.state_dict()) == names
    other = stack(heads=heads)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), before["y"])

    for rule in ("dsf", "gate"):
        sf.swap(model, rule)
        found = gradients(model, x)
        torch.testing.assert_close(found["y"], before["y"])
        assert any(not torch.allclose(found[name], before[name], rtol=1e-2) for name in found)
    sf.swap(model, f"gate+{x.shape[1]}")
    torch.testing.assert_close(gradients(model, x), before, rtol=1e-7, atol=1e-8)

    outputs, state = [], None
    for t in range(5):
        y, state = model.step(x[:, t : t + 1], state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), model(x[:, :5]))
    assert type(sf.restore(model).blocks[0].xlstm.slstm_cell) is plain
    torch.testing.assert_close(gradients(model, x), before)


def test_a_cell_that_statefeed_does_not_have_is_left():
    config = sLSTMCellConfig(hidden_size=H, num_heads=2, backend="vanilla", function="lstm")
    with pytest.warns(UserWarning, match="converts the function 'slstm' of the cell, got 'lstm'"):
        sf.swap(nn.Sequential(sLSTMCell(config)))


def test_training(compare):
    """Next value of a noisy square wave."""
    data = torch.sign(torch.sin(torch.arange(64.0).view(1, -1, 1) / 3 + torch.randn(16, 1, 1)))
    data = data + 0.1 * torch.randn(data.shape, generator=torch.Generator().manual_seed(0))

    def fit(swapped):
        model = nn.Sequential(nn.Linear(1, 16), stack(torch.float32), nn.Linear(16, 1))
        if swapped:
            sf.swap(model)
        optimizer = torch.optim.Adam(model.parameters(), 0.003)
        losses = []
        for _ in range(20):
            loss = nn.functional.mse_loss(model(data[:, :-1])[:, :, 0], data[:, 1:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, model

    _, model = compare("xlstm", "two sLSTM blocks, 2 heads", "63x16x16", fit)
    assert isinstance(model[1].blocks[0].xlstm.slstm_cell, sf.FeedbackLayer)
