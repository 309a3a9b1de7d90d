"""The sLSTM cell of the xlstm package, converted by ``swap``: it takes preactivations of all gates, without W_ih."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from statefeed.cells import CELLS, Cell
from statefeed.conversions.protocol import ConvertedLayer

# Settings of the package's CUDA kernels that change the function or its gradient, with the values that do not.
_PLAIN = {"gradient_recurrent_cut": False, "gradient_recurrent_clipval": None, "forward_clipval": None}


class XLSTMCell(ConvertedLayer):
    """Methods that replace those of ``xlstm.blocks.slstm.cell.sLSTMCell``, with the vanilla or the CUDA backend.

    Parameters keep their names and shapes, so that a ``state_dict`` fits both ways. The first step is found unit by
    unit, where the package's vanilla backend tests the whole batch.
    """

    config: Any
    _recurrent_kernel_: Tensor
    _bias_: Tensor

    @classmethod
    def unsupported_module(cls, module: nn.Module) -> str | None:
        """Why a cell of the package cannot be converted.

        Args:
            module: the cell before conversion.

        Returns:
            The reason in one sentence; None if it can.
        """
        config: Any = module.config
        if config.function != "slstm":
            return f"statefeed converts the function 'slstm' of the cell, got {config.function!r}"
        for name, plain in _PLAIN.items():
            value = getattr(config, name, plain)
            if value != plain:
                return f"statefeed has no {name}: it must be {plain}, got {value}"
        return None

    @property
    def feedback_cell(self) -> Cell:
        return CELLS["slstm"]

    @property
    def feedback_units(self) -> int:
        return int(self.config.hidden_size)

    def forward(self, input: Tensor, state: Tensor | None = None, lengths: Any = None) -> tuple[Tensor, Tensor]:
        """Run the cell over a sequence; arguments and results are those of the package's cell.

        Args:
            input: preactivations without the recurrent part and the bias, (B, T, 4H), or (T, B, 4H) with
                ``config.input_shape="SBGNH"``; gates i, f, z, o.
            state: h, c, n and m, (4, B, H); zeros if None.
            lengths: not used, as in the package.

        Returns:
            Outputs in the form of ``config.output_shape``, and the final state (4, B, H).

        Gradient: that of ``feedback``; m is a constant.

        Raises:
            ValueError: the input does not have 4H features.
        """
        H = self.feedback_units
        if input.shape[-1] != 4 * H:
            raise ValueError(f"the input must have 4 * hidden_size = {4 * H} features, got {tuple(input.shape)}")
        x = input if self.config.input_shape == "SBGNH" else input.transpose(0, 1)
        states = tuple(x.new_zeros(4, x.shape[1], H) if state is None else state)
        w_hh, b_ih = self._weights()
        # Without W_ih, x is the preactivation; the package has one bias.
        weights = (w_hh.new_empty(0), w_hh, b_ih, torch.zeros_like(b_ih))
        y, final = self.feedback_run(x, states, weights)
        output, last = self._permute_output(y), torch.stack(final)  # type: ignore[operator]
        if torch.is_autocast_enabled("cuda"):
            return output, last
        return output.to(input.dtype), last.to(input.dtype)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """W_hh and b_ih in statefeed's form, from that of either backend of the package."""
        kernel = self._recurrent_kernel_int2ext(self._recurrent_kernel_)  # type: ignore[operator]
        bias = self._bias_int2ext(self._bias_)  # type: ignore[operator]
        width = kernel.shape[-1]  # kernel: (heads, columns, gates, rows); bias: (heads, gates, rows)
        return kernel.permute(2, 0, 3, 1).reshape(-1, width), bias.transpose(0, 1).reshape(-1)
