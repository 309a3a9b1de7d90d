"""xlstm: its sLSTM block, in float64 and without CUDA, is a special case of the trainer's block."""

import pytest
import torch

from statefeed.lm.config import Model
from statefeed.lm.model.blocks import XLSTMBlock

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
xlstm = pytest.importorskip("xlstm", reason="run `make interop`")
from xlstm.blocks.slstm.block import sLSTMBlock, sLSTMBlockConfig  # noqa: E402
from xlstm.blocks.slstm.layer import sLSTMLayerConfig  # noqa: E402
from xlstm.components.feedforward import FeedForwardConfig  # noqa: E402

H, HEADS, T, B = 96, 4, 11, 3  # 4/3 of 96 units are 128, a multiple of 8 and of 64


@pytest.mark.parametrize("kernel", [0, 4])
@torch.no_grad()
def test_the_block_is_the_packages_where_its_zeros_are_zero(kernel):
    torch.manual_seed(0)
    layer = sLSTMLayerConfig(embedding_dim=H, num_heads=HEADS, conv1d_kernel_size=kernel, backend="vanilla")
    mlp = FeedForwardConfig(proj_factor=4 / 3, embedding_dim=H)
    theirs = sLSTMBlock(sLSTMBlockConfig(slstm=layer, feedforward=mlp, _num_blocks=1, _block_idx=0)).double()
    recipe = Model(cell="slstm", block="xlstm", width=H, heads=HEADS, convolution=kernel, feedback="bptt")
    ours = XLSTMBlock(recipe).double()
    for parameter in theirs.parameters():
        parameter += 0.3 * torch.randn_like(parameter)

    cell, inputs = theirs.xlstm, torch.zeros(4 * H, 2 * H if kernel else H, dtype=torch.float64)
    for gate, (name, convolved) in enumerate((("fgate", True), ("igate", True), ("zgate", False), ("ogate", False))):
        columns = slice(0, H) if convolved or not kernel else slice(H, 2 * H)
        inputs[gate * H : (gate + 1) * H, columns] = torch.block_diag(*getattr(cell, name).weight)
    ours.rnn.from_xlstm({"W": inputs, "R": cell.slstm_cell._recurrent_kernel_, "b": cell.slstm_cell._bias_})
    state = dict.fromkeys(
        ("rnn_norm.bias", "head_norm.bias", "mlp_norm.bias", "up.bias", "down.bias"), torch.tensor(0.0)
    )
    state |= {
        "rnn_norm.weight": 1 + theirs.xlstm_norm.weight,
        "head_norm.weight": 1 + cell.group_norm.weight,
        "mlp_norm.weight": 1 + theirs.ffn_norm.weight,
        "up.weight": theirs.ffn.proj_up.weight,
        "down.weight": theirs.ffn.proj_down.weight,
    }
    if kernel:
        state |= {f"convolution.{name}": value for name, value in cell.conv1d.conv.named_parameters()}
    for name, value in state.items():
        ours.get_parameter(name).copy_(value)

    x = torch.randn(T, B, H, dtype=torch.float64)
    y, _ = ours(x, None, None)
    torch.testing.assert_close(y, theirs(x.transpose(0, 1)).transpose(0, 1), rtol=1e-11, atol=1e-11)
