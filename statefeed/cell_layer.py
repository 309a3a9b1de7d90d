"""Base class of layers whose cell is not in torch: the interface of torch.nn.GRU around any ``Cell``."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from statefeed.cells.protocol import Cell, State
from statefeed.feedback import Feedback, FeedbackLike
from statefeed.feedback.value import check_keyword_only
from statefeed.stack import RecurrentStack
from statefeed.user_warning import warn


class CellLayer(RecurrentStack):
    """Base class of a layer whose cell is not in torch; a subclass sets ``cell``.

    Input forms, state and parameter names are those of torch.nn.GRU: ``weight_ih_l0``, ``weight_hh_l0``,
    ``bias_ih_l0``, ``bias_hh_l0``, and the same with the suffix ``_reverse``. Shapes are those of
    ``cell.weight_shapes``; initial values are uniform in (-1/sqrt(H), 1/sqrt(H)). The first backend that supports the
    cell runs it; the reference backend supports every cell.

    Args:
        input_size: I, number of input features.
        hidden_size: H, number of features of the state.
        num_layers: L, number of stacked layers.
        bias: whether the layer has b_ih and b_hh.
        batch_first: inputs and outputs are (B, T, .) instead of (T, B, .).
        dropout: dropout probability between layers in training.
        bidirectional: add a reverse direction to every layer.
        device: device of the parameters.
        dtype: dtype of the parameters.
        feedback: the gradient rule, in any spelling of ``Feedback``; settable as ``layer.feedback``.

    Gradient: that of the rule; exact under ``"bptt"``, the default, and with k >= T corrections.

    Raises:
        ValueError: a size that is not positive, a dropout outside 0 to 1, or a rule that the layer does not support,
            such as ``"torch"``.

    Cost: on the reference backend one call of ``cell.step`` per step forward, without autograd; backward as GRU.

    Example:
        >>> import torch
        >>> from statefeed.cells import CELLS
        >>> class Tanh(CellLayer):
        ...     cell = CELLS["rnn_tanh"]
        >>> layer = Tanh(3, 5, num_layers=2, feedback="jacobian")
        >>> layer
        Tanh(3, 5, num_layers=2, feedback='jacobian')
        >>> y, h = layer(torch.zeros(7, 2, 3))
        >>> tuple(y.shape), tuple(h.shape)
        ((7, 2, 5), (2, 2, 5))
    """

    cell: ClassVar[Cell]
    # Arguments that extra_repr shows, with the values for which it does not.
    shown_defaults: ClassVar[dict[str, object]] = {
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
    }
    _torchscript = "TorchScript cannot hold a feedback rule: export the layer with torch.export instead"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        feedback: FeedbackLike = "bptt",
    ) -> None:
        super().__init__()
        if not hasattr(type(self), "cell"):
            raise TypeError(f'{type(self).__name__} must set the class attribute cell, as in cell = CELLS["mgu"]')
        arguments = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)
        check_keyword_only(type(self).__name__, arguments)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {size!r}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability between 0 and 1, got {dropout!r}")
        if dropout and num_layers == 1:
            warn(f"dropout acts between layers: dropout={dropout} changes nothing with num_layers=1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        directions = 2 if bidirectional else 1
        for layer in range(num_layers):
            width = hidden_size * directions if layer else input_size
            for suffix in ("", "_reverse")[:directions]:
                for name, shape in self.weight_shapes(width).items():
                    if bias or not name.startswith("bias"):
                        weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                        self.register_parameter(f"{name}_l{layer}{suffix}", weight)
        self.reset_parameters()
        self.feedback = feedback

    @property
    def feedback_cell(self) -> Cell:
        return self.cell

    def weight_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of one layer and direction.

        Args:
            width: number of features of its input.

        Returns:
            Shapes by name without the suffix, biases last.
        """
        return self.feedback_cell.weight_shapes(width, self.hidden_size)

    def unsupported_reason(self, rule: Feedback) -> str | None:
        """Why the layer does not support a rule.

        Args:
            rule: any rule.

        Returns:
            The reason in one sentence; None if the layer supports the rule.
        """
        if rule.through_torch:
            return (
                f'feedback "torch" needs a layer of torch.nn, which has no cell {self.feedback_cell.name!r}; use '
                '"bptt", or statefeed.Recurrent if you need a second derivative'
            )
        return super().unsupported_reason(rule)

    def complex_reason(self, rule: Feedback, dtype: torch.dtype) -> str:
        return f"{type(self).__name__} is defined for real numbers, got {dtype}"

    def reset_parameters(self) -> None:
        """Initialize the weights again and reset the learned diagonal."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)
        self.reset_diagonal()

    def extra_repr(self) -> str:
        values = {name: (getattr(self, name), default) for name, default in self.shown_defaults.items()}
        options = [f"{name}={value!r}" for name, (value, default) in values.items() if value != default]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *options, self.feedback_repr()])

    def _check(self, x: Tensor, state: State, batch_sizes: Tensor | None) -> None:
        if x.dim() != (3 if batch_sizes is None else 2) or x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"the input must have input_size = {self.input_size} features per step, got the shape {tuple(x.shape)}"
            )
        weights = [weight for layer in range(self.num_layers) for weight in self._weights_of(layer)]
        devices = sorted({str(t.device) for t in (x, *state, *weights)})
        if len(devices) > 1:
            raise RuntimeError(f"the input, hx and the weights must be on one device, got {' and '.join(devices)}")
        weight = weights[0]
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"the input must have the dtype of the weights, {weight.dtype}, got {x.dtype}")
        B = x.shape[0 if self.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        expected = [(self._feedback_rows, B, width) for width in self._state_widths]
        got = [tuple(s.shape) for s in state]
        if got != expected:
            raise RuntimeError(f"hx must have the shape {' and '.join(map(str, expected))}, got {got}")
