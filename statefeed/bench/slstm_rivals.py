"""Rivals of ``sf.SLSTM``, for which torch.nn has no layer: a loop over a compiled step, and the xlstm package."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf

_PACKAGE = "xlstm"
_RECOMPILATIONS = 64  # shapes, dtypes and modes of all cases; torch's default of 8 would end in eager steps


def missing_package() -> str | None:
    """Why the xlstm package is no rival; None if it is installed."""
    return None if importlib.util.find_spec(_PACKAGE) else "the package xlstm is not installed"


class Loop(nn.Module):
    """An sLSTM as a Python loop over one step, with autograd; one layer, one direction, sigmoid forget gate.

    Args:
        layer: its weights are copied, under their names.
        compiled: whether the step is compiled by torch.compile, once; the loop never is.
    """

    def __init__(self, layer: sf.SLSTM, compiled: bool) -> None:
        super().__init__()
        for name, weight in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))
        self.heads = layer.num_heads
        self.step: Callable[..., tuple[Tensor, ...]] = step
        if compiled:
            torch._dynamo.config.recompile_limit = _RECOMPILATIONS
            self.step = torch.compile(step, fullgraph=True, dynamic=False)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs (T, B, H) and the final (h, c, n, m) of x (T, B, I)."""
        w: dict[str, Tensor] = dict(self.named_parameters())
        inputs = F.linear(x, w["weight_ih_l0"], w["bias_ih_l0"] + w["bias_hh_l0"])
        width = w["weight_hh_l0"].shape[1]
        blocks = w["weight_hh_l0"].view(4, self.heads, width, width).permute(1, 3, 0, 2).flatten(2)
        states = tuple(x.new_zeros(x.shape[1], self.heads * width) for _ in range(4))
        outputs = []
        for row in inputs.unbind():
            states = self.step(row, blocks, *states)
            outputs.append(states[0])
        return torch.stack(outputs), states


def step(inputs: Tensor, blocks: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """One step of an sLSTM.

    Args:
        inputs: x W_ih^T + b, (B, 4H), gates i, f, z, o.
        blocks: recurrent weights, (heads, H / heads, 4 H / heads).
        h: (B, H), as c, n and m.
        c: cell state.
        n: normalizer.
        m: stabilizer.

    Returns:
        The next h, c, n, m.
    """
    heads, width, _ = blocks.shape
    recurrent = torch.bmm(h.view(-1, heads, width).transpose(0, 1).to(blocks.dtype), blocks)
    recurrent = recurrent.view(heads, -1, 4, width).permute(1, 2, 0, 3).flatten(1)
    i, f, z, o = (inputs + recurrent).to(c.dtype).chunk(4, -1)
    log_f = F.logsigmoid(f)
    after = torch.where(n == 0, i, torch.maximum(i, log_f + m)).detach()  # h does not depend on it
    i, f = (i - after).exp(), (log_f + m - after).exp()
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    return torch.sigmoid(o) * c / n, c, n, after


class Package(nn.Module):
    """The sLSTM cell of the xlstm package with its vanilla backend, and the input weights in front of it.

    Args:
        layer: its weights are copied.
    """

    def __init__(self, layer: sf.SLSTM) -> None:
        super().__init__()
        package = importlib.import_module("xlstm.blocks.slstm.cell")
        weights = layer.to_xlstm()
        config = package.sLSTMCellConfig(
            hidden_size=layer.hidden_size,
            num_heads=layer.num_heads,
            backend="vanilla",
            input_shape="SBGNH",
            output_shape="SBH",
        )
        self.cell = package.sLSTMCell(config).to(weights["W"])
        self.inputs = nn.Linear(layer.input_size, 4 * layer.hidden_size, bias=False).to(weights["W"])
        with torch.no_grad():
            self.inputs.weight.copy_(weights["W"])
            self.cell._recurrent_kernel_.copy_(weights["R"])
            self.cell._bias_.copy_(weights["b"])

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Outputs (T, B, H) and the final states (4, B, H) of x (T, B, I)."""
        y, states = self.cell(self.inputs(x))
        return y, states
