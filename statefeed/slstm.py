"""SLSTM: the recurrent half of xLSTM as a layer, and its weights in the form of the xlstm package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from statefeed.cell_layer import CellLayer
from statefeed.cells import CELLS, Cell
from statefeed.feedback import FeedbackLike

_CELLS = {"sigmoid": "slstm", "exponential": "slstm_exp"}


class SLSTM(CellLayer):
    """sLSTM layer of xLSTM with a feedback rule.

    ``c[t] = f c[t-1] + i z``, ``n[t] = f n[t-1] + i``, ``h[t] = o c[t] / n[t]`` with ``z = tanh(pre_z)``,
    ``o = sigmoid(pre_o)``, an exponential input gate, a sigmoid or exponential forget gate, and
    ``pre = x[t] W_ih^T + b_ih + h[t-1] W_hh^T + b_hh`` with block-diagonal W_hh (Beck et al., arXiv 2405.04517). c and
    n are stored divided by ``exp(m)``; the stabilizer m follows the largest exponent, so that nothing overflows.

    The state is the tuple (h, c, n, m). A unit whose n is 0 starts: its m is not used, and its c must be 0. Inputs and
    outputs have the forms of torch.nn.LSTM. Gates are in the order i, f, z, o; ``weight_hh_l0`` is (4H, H / heads),
    gate after gate, and its columns are the units of the row's head.
    Initial values are those of the xlstm package: W_ih normal with variance 2 / (5 I), W_hh zero, the bias of the
    forget gate from 5 down to -7 within every head (``"powerlaw_blockdependent"``, with the layer for the block), other
    biases zero.

    Args:
        input_size: I, number of input features.
        hidden_size: H, number of features of every part of the state.
        num_layers: L, number of stacked layers.
        num_heads: number of equal blocks of W_hh.
        forget_gate: ``"sigmoid"`` or ``"exponential"``.
        bias: whether the layer has b_ih and b_hh.
        batch_first: inputs and outputs are (B, T, .) instead of (T, B, .).
        dropout: dropout probability between layers in training.
        bidirectional: add a reverse direction to every layer.
        device: device of the parameters.
        dtype: dtype of the parameters.
        feedback: the gradient rule, in any spelling of ``Feedback``; settable as ``layer.feedback``. A tensor diagonal
            covers the concatenated states (h, c, n) and has the shape (3H,).

    Gradient: that of the rule; exact under ``"bptt"``, the default, and with k >= T corrections, for every loss on h,
        also if h comes from a later call that received the final state. m is a constant: the final m does not require
        grad, the gradient of an initial m is zero, and that of a loss on the final c or n is the one at fixed m.

    Raises:
        ValueError: hidden_size is not a multiple of num_heads, another forget_gate, or a rule that the layer does not
            support, such as ``"torch"``.

    Cost: 2 * B * 4H * H / heads flops per step forward for the recurrent product; backward O(H) per step for the
        states, and three matrix products over all steps at once. On a GPU the forward pass and the backward pass of
        ``"bptt"`` are loops over time in PyTorch; that of the other rules is not, and has Triton kernels.

    Example:
        >>> import torch
        >>> layer = SLSTM(3, 8, num_heads=2, feedback="gate+1")
        >>> layer
        SLSTM(3, 8, num_heads=2, feedback='gate+1')
        >>> y, (h, c, n, m) = layer(torch.zeros(7, 5, 3))
        >>> tuple(y.shape), tuple(m.shape), tuple(layer.weight_hh_l0.shape)
        ((7, 5, 8), (1, 5, 8), (32, 4))
    """

    cell = CELLS["slstm"]
    shown_defaults = {"num_layers": 1, "num_heads": 1, "forget_gate": "sigmoid"} | CellLayer.shown_defaults

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        num_heads: int = 1,
        forget_gate: Literal["sigmoid", "exponential"] = "sigmoid",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        feedback: FeedbackLike = "bptt",
    ) -> None:
        if forget_gate not in _CELLS:
            raise ValueError(f'forget_gate must be "sigmoid" or "exponential", got {forget_gate!r}')
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"num_heads must be a whole number above 0, got {num_heads!r}")
        if isinstance(hidden_size, int) and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {hidden_size} units for {num_heads} heads: use "
                f"{max(1, hidden_size // num_heads) * num_heads} units or another number of heads"
            )
        self.num_heads, self.forget_gate = num_heads, forget_gate
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            feedback=feedback,
        )

    @property
    def feedback_cell(self) -> Cell:
        return CELLS[_CELLS[self.forget_gate]]

    def weight_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of one layer and direction; W_hh without the zeros between heads.

        Args:
            width: number of features of its input.

        Returns:
            Shapes by name without the suffix, biases last.
        """
        shapes = super().weight_shapes(width)
        return shapes | {"weight_hh": (shapes["weight_hh"][0], self.hidden_size // self.num_heads)}

    def reset_parameters(self) -> None:
        """Initialize the weights again, as the xlstm package does, and reset the learned diagonal."""
        self._check_unparametrized("reset_parameters")
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.startswith("weight_ih"):
                    nn.init.normal_(weight, std=math.sqrt(2 / (5 * weight.shape[1])))
                else:
                    nn.init.zeros_(weight)
                if name.startswith("bias_ih"):
                    layer = int(name.removesuffix("_reverse").removeprefix("bias_ih_l"))
                    weight.view(4, self.num_heads, -1)[1] = self._forget_bias(layer).to(weight)
        self.reset_diagonal()

    def _forget_bias(self, layer: int) -> Tensor:
        """The initial bias of the forget gates of one head, from 5 down to -7."""
        width = self.hidden_size // self.num_heads
        power = 0.3 + 1.3 * layer / max(1, self.num_layers - 1)
        return 5 - 12 * (torch.arange(width, device="cpu") / max(1, width - 1)) ** power

    def to_xlstm(self, layer: int = 0, reverse: bool = False) -> dict[str, Tensor]:
        """The weights of one layer as the xlstm package stores them.

        ``R`` and ``b`` are ``_recurrent_kernel_`` and ``_bias_`` of the package's sLSTM cell with the vanilla backend.
        Its cell has no W: a package's layer computes ``x W^T`` before it.

        Args:
            layer: index of the layer.
            reverse: the reverse direction of a bidirectional layer.

        Returns:
            ``{"W": (4H, I), "R": (heads, 4 H / heads, H / heads), "b": (4H,)}``, gates i, f, z, o; copies, with
            ``b = b_ih + b_hh``, zero without biases.

        Gradient: none.

        Raises:
            ValueError: there is no such layer or direction, or the forget gate is exponential.

        Example:
            >>> weights = SLSTM(3, 8, num_heads=2).to_xlstm()
            >>> [(name, tuple(value.shape)) for name, value in weights.items()]
            [('W', (32, 3)), ('R', (2, 16, 4)), ('b', (32,))]
        """
        w_ih, w_hh, *biases = (w.detach() for w in self._of(layer, reverse))
        width = w_hh.shape[1]
        blocks = w_hh.view(4, self.num_heads, width, width).transpose(0, 1)
        return {
            "W": w_ih.clone(),
            "R": blocks.reshape(self.num_heads, 4 * width, width),
            "b": biases[0] + biases[1] if biases else w_ih.new_zeros(len(w_ih)),
        }

    def from_xlstm(self, weights: Mapping[str, Tensor], layer: int = 0, reverse: bool = False) -> SLSTM:
        """Copy the weights of one layer from the form of ``to_xlstm``.

        Args:
            weights: ``{"W": (4H, I), "R": (heads, 4 H / heads, H / heads), "b": (4H,)}``; b becomes b_ih, and b_hh
                zero.
            layer: index of the layer.
            reverse: the reverse direction of a bidirectional layer.

        Returns:
            This layer.

        Raises:
            ValueError: a missing key, a wrong shape, a b that is not zero for a layer without biases, or an exponential
                forget gate.
            RuntimeError: a weight of the layer is parametrized.

        Example:
            >>> import torch
            >>> first, second = SLSTM(3, 8, num_heads=2), SLSTM(3, 8, num_heads=2)
            >>> second = second.from_xlstm(first.to_xlstm())
            >>> x = torch.randn(7, 5, 3)
            >>> torch.equal(first(x)[0], second(x)[0])
            True
        """
        self._check_unparametrized("from_xlstm")
        w_ih, w_hh, *biases = self._of(layer, reverse)
        expected = {name: tuple(value.shape) for name, value in self.to_xlstm(layer, reverse).items()}
        got = {name: tuple(value.shape) for name, value in weights.items()}
        if got != expected:
            raise ValueError(f"the weights of this layer in the form of the xlstm package are {expected}, got {got}")
        if not biases and bool(weights["b"].any()):
            raise ValueError(
                f"a layer with bias=False needs b = 0, got values up to {float(weights['b'].abs().max()):g}: create "
                "the layer with bias=True"
            )
        with torch.no_grad():
            w_ih.copy_(weights["W"])
            width = w_hh.shape[1]
            w_hh.copy_(weights["R"].reshape(-1, 4, width, width).transpose(0, 1).reshape(w_hh.shape))
            for bias, value in zip(biases, (weights["b"], 0), strict=False):
                bias.fill_(0).add_(value)
        return self

    def _check_unparametrized(self, method: str) -> None:
        """Raise before values are written to a weight that is computed from parameters, where they would be lost."""
        weights = [weight for layer in range(self.num_layers) for weight in self._weights_of(layer)]
        if not all(isinstance(weight, nn.Parameter) for weight in weights):
            raise RuntimeError(
                f"{method} needs weights that are parameters, got computed ones: call it before parametrizing"
            )

    def _of(self, layer: int, reverse: bool) -> list[Any]:
        """The weights of one layer and direction."""
        if self.forget_gate != "sigmoid":
            raise ValueError(
                f'the cell of the xlstm package has a sigmoid forget gate, got forget_gate="{self.forget_gate}": use '
                "state_dict instead"
            )
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be between 0 and {self.num_layers - 1}, got {layer}")
        if reverse and not self.bidirectional:
            raise ValueError("reverse must be False, because the layer has bidirectional=False, got True")
        weights = self._weights_of(layer)
        count = len(weights) // (2 if self.bidirectional else 1)
        return weights[count:] if reverse else weights[:count]
