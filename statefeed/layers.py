"""RNN, GRU and LSTM: torch.nn's layers with a feedback rule."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from statefeed import torch_functions
from statefeed.backends import BACKENDS, flatten_weights
from statefeed.cells import CELLS, Cell, State
from statefeed.feedback import FeedbackLike
from statefeed.feedback.value import check_keyword_only
from statefeed.paths import extent, is_faster_as_a_cell, is_faster_in_torch, lacks_bf16, reason, way_of
from statefeed.stack import Path, RecurrentStack, permute
from statefeed.transforms import is_expanded, is_transformed

_TORCHSCRIPT = (
    "TorchScript cannot hold a feedback rule: call statefeed.restore(model), then script or trace torch.nn's layers, "
    'or trace the model under feedback "bptt"'
)

_COMPILED_LSTM = (
    'torch.compile cannot train the LSTM of torch.nn: set feedback to "bptt", which is exact too, or compile the model '
    "without the layer"
)


class RecurrentLayer(RecurrentStack, nn.RNNBase):
    """Base class of RNN, GRU and LSTM: the constructor and parameters of torch.nn.RNNBase, and torch's own path."""

    _torchscript = _TORCHSCRIPT

    def __init__(self, *args: Any, feedback: FeedbackLike = "bptt", **kwargs: Any) -> None:
        check_keyword_only(type(self).__name__, args)
        super().__init__(*args, **kwargs)
        self.feedback = feedback

    @property
    def feedback_cell(self) -> Cell:
        return CELLS[f"{self.mode.lower()}_projected" if self.proj_size else self.mode.lower()]

    @property
    def _output_width(self) -> int:
        return self.proj_size or self.hidden_size

    def reset_parameters(self) -> None:
        """Initialize the weights again, as torch's layers do, and reset the learned diagonal."""
        super().reset_parameters()
        self.reset_diagonal()

    def flatten_parameters(self) -> None:
        """Move the weights into contiguous buffers that cuDNN reads without a copy.

        An exact rule runs all layers in one call of torch's own path and needs one buffer for all of them. The other
        rules run layer by layer and need one buffer per layer.
        """
        if not self._layer_by_layer:
            super().flatten_parameters()
            return
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            flatten_weights(self.feedback_cell, self._weights_of(layer), directions)

    @property
    def _layer_by_layer(self) -> bool:
        """Whether every pass on a GPU, with autograd or without, runs one layer after the other."""
        weight = next(self.parameters(), None)  # None if another module sets the weights
        if "_feedback" not in self.__dict__ or weight is None or not weight.is_cuda:
            return False
        return not self._feedback.exact or self._newton is not None

    def _rule_changed(self) -> None:
        self.flatten_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.feedback_repr()}"

    def _backend(self, input: Tensor | PackedSequence, hx: Any, weights: list[list[Tensor]]) -> str | None:
        """None, so that torch's own layer runs, also without kernels if the rule is exact or autograd is disabled."""
        name = super()._backend(input, hx, weights)
        if name is None or self._newton is not None:
            return name
        if self._feedback.exact and BACKENDS[name].fallback:
            return None
        fused = torch.is_grad_enabled() or BACKENDS[name].fused_forward or self._layer_by_layer
        return name if fused else None

    def torch_path_reason(self, input: Tensor | PackedSequence) -> str | None:
        """Why torch's own layer runs a call on this input, even if kernels support it; None if a backend may run it."""
        if self._feedback.through_torch:
            return '"torch" selects torch\'s own layer'
        if self._in_torch(input) is None:
            return None
        way = None if is_transformed() else way_of(self.mode, input, self.proj_size > 0)
        if way is None or torch.compiler.is_exporting():
            return "torch.export, traces and torch.func without autograd have torch's own layer"
        return reason(way, *extent(input, self.batch_first), self.hidden_size)

    def _in_torch(self, input: Tensor | PackedSequence) -> Path | None:
        # Without words, because it takes a part of a small layer's time.
        if self._feedback.through_torch:
            return self._torch_path
        if self._newton is not None:
            return None
        if torch.compiler.is_exporting():
            return self._torch_path
        if is_transformed():
            if self._feedback.exact and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                return self._torch_path
            return None if torch.is_grad_enabled() or self._layer_by_layer else self._torch_path
        # An approximate rule trains through kernels; under autocast torch's forward pass would differ visibly.
        if not self._feedback.exact and (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            return None
        # The answers of torch.compile and of ExpandedWeights do not depend on the shape.
        if torch.compiler.is_compiling() or not self.is_faster_in_torch(input):
            return None
        if is_expanded(self._weight("weight_hh_l0")):
            return None
        return self._torch_function if isinstance(input, PackedSequence) or input.dim() == 3 else self._torch_path

    def is_faster_in_torch(self, input: Tensor | PackedSequence) -> bool:
        """Whether a fixed table prefers torch's own layer on an input; a subclass that returns False ignores it."""
        way = way_of(self.mode, input, self.proj_size > 0)
        return way is not None and is_faster_in_torch(way, *extent(input, self.batch_first), self.hidden_size)

    def _torch_path(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        """The forward pass of torch.nn's layer."""
        if self.mode == "LSTM":
            if torch.compiler.is_compiling() and torch.is_grad_enabled() and not torch.compiler.is_exporting():
                raise RuntimeError(_COMPILED_LSTM)
            if not self.proj_size and lacks_bf16(input):
                return self._in_float32(input, hx)
        return super(RecurrentStack, self).forward(input, hx)  # type: ignore[no-any-return]

    def _torch_function(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        """The same by torch's functions, on a CPU; torch.nn's layer runs what does not fit."""
        steps, sequences = extent(input, self.batch_first)
        if hx is not None and isinstance(hx, Tensor) == (self.mode == "LSTM"):
            return self._torch_path(input, hx)
        if isinstance(input, PackedSequence):
            x, batch_sizes, sorted_indices, unsorted_indices = input
        else:
            x, batch_sizes, sorted_indices = input, None, None
        state = None if hx is None else permute(self._as_state(hx), sorted_indices)
        weights = [self._weights_of(layer) for layer in range(self.num_layers)]
        on_cpu = all(w.device.type == "cpu" for layer_weights in weights for w in layer_weights)
        if not on_cpu or not self._fits(x, state, sequences, batch_sizes):
            return self._torch_path(input, hx)
        if steps == 1 and not self.proj_size and (self.mode != "LSTM" or is_faster_as_a_cell(x, sequences)):
            y, final = torch_functions.step(self, weights, x, state)
        else:
            y, final = torch_functions.sequence(self, weights, x, state, batch_sizes)
        if batch_sizes is None:
            return y, self._as_hx(final)
        packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self._as_hx(permute(final, unsorted_indices))

    def _in_float32(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        """Run torch's path without the enabled autocast, and return results in the dtype of that autocast."""
        dtype = self._weights_of(0)[0].dtype
        with torch.autocast("cpu", enabled=False):
            state = None if hx is None else tuple(s.to(dtype) for s in hx)
            y, final = super(RecurrentStack, self).forward(_to(input, dtype), state)
        return _to(y, torch.bfloat16), tuple(s.to(torch.bfloat16) for s in final)

    def _check(self, x: Tensor, state: State, batch_sizes: Tensor | None) -> None:
        sequences = x.shape[0 if self.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        if not self._fits(x, state, sequences, batch_sizes):
            self.check_forward_args(x, self._as_hx(state), batch_sizes)

    def _fits(self, x: Tensor, state: State | None, sequences: int, batch_sizes: Tensor | None) -> bool:
        """Whether an input, and its initial state if there is one, are as torch's check wants them."""
        dims = 3 if batch_sizes is None else 2
        if x.dim() != dims or x.shape[-1] != self.input_size or x.dtype != self._weight("weight_hh_l0").dtype:
            return False
        if state is None:
            return True
        rows, widths = self._feedback_rows, self._state_widths
        return len(state) == len(widths) and all(
            s.shape == (rows, sequences, width) for s, width in zip(state, widths, strict=True)
        )


def _to(input: Tensor | PackedSequence, dtype: torch.dtype) -> Tensor | PackedSequence:
    return input.to(dtype) if isinstance(input, Tensor) else input._replace(data=input.data.to(dtype))


def _signature(**more: tuple[str, Any]) -> inspect.Signature:
    """The signature that torch.nn documents, with ``feedback``.

    Args:
        more: further arguments by name: (name of the argument before it, default value).
    """
    defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
    arguments: dict[str, Any] = {"input_size": inspect.Parameter.empty, "hidden_size": inspect.Parameter.empty}
    for name, default in defaults.items():
        arguments[name] = default
        arguments |= {added: value for added, (after, value) in more.items() if after == name}
    types: dict[str, Any] = {name: type(value) for name, value in arguments.items()}
    types |= {"input_size": int, "hidden_size": int, "device": torch.device | str | None, "dtype": torch.dtype | None}
    arguments |= {"device": None, "dtype": None}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=types[name])
        for name, default in arguments.items()
    ]
    rule = inspect.Parameter("feedback", inspect.Parameter.KEYWORD_ONLY, default="bptt", annotation="FeedbackLike")
    return inspect.Signature([*parameters, rule])


class RNN(RecurrentLayer, nn.RNN):
    """torch.nn.RNN with a feedback rule.

    ``h[t] = act(x[t] W_ih^T + b_ih + h[t-1] W_hh^T + b_hh)``, with the forward pass of torch.nn.RNN. The gradient is
    exact by default. Under an approximate rule that of the state is ``delta[t] = e[t] + D[t+1] * delta[t+1]``, where e
    comes from outside the recurrence and D is the diagonal of the rule (arXiv 2503.23104).

    Args:
        input_size: I, number of input features.
        hidden_size: H, number of features of the state.
        num_layers: L, number of stacked layers.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether the layer has b_ih and b_hh.
        batch_first: inputs and outputs are (B, T, .) instead of (T, B, .).
        dropout: dropout probability between layers in training.
        bidirectional: add a reverse direction to every layer.
        device: device of the parameters.
        dtype: dtype of the parameters.
        feedback: the gradient rule, in any spelling of ``Feedback`` but ``"gate"``; settable as ``layer.feedback``.

    Gradient: that of the rule; exact under ``"bptt"``, the default, ``"torch"`` and with k >= T corrections.

    Raises:
        ValueError: an unknown rule, or ``"gate"``, because an RNN has no direct path.

    Cost: under an approximate rule backward O(H) per step for the state, and three matrix products over all steps at
        once; under ``"bptt"`` one product more at every step.

    Example:
        >>> import torch
        >>> layer = RNN(3, 5, feedback="jacobian")
        >>> y, h = layer(torch.zeros(7, 2, 3))
        >>> tuple(y.shape), tuple(h.shape)
        ((7, 2, 5), (1, 2, 5))
    """

    __signature__ = _signature(nonlinearity=("num_layers", "tanh"))


class GRU(RecurrentLayer, nn.GRU):
    """torch.nn.GRU with a feedback rule.

    ``h[t] = (1 - z) n + z h[t-1]``, ``n = tanh(W_in x + b_in + r (W_hn h[t-1] + b_hn))``, with the forward pass
    of torch.nn.GRU. The gradient is exact by default. Under an approximate rule that of the state is
    ``delta[t] = e[t] + D[t+1] * delta[t+1]``, where e comes from outside the recurrence and D is the diagonal of the
    rule (arXiv 2503.23104).

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

    Gradient: that of the rule; exact under ``"bptt"``, the default, ``"torch"`` and with k >= T corrections.

    Raises:
        ValueError: an unknown rule.

    Cost: under an approximate rule backward O(H) per step for the state, and three matrix products over all steps at
        once; under ``"bptt"`` one product more at every step.

    Example:
        >>> import torch
        >>> layer = GRU(3, 5, num_layers=2, batch_first=True, feedback="gate+1")
        >>> y, h = layer(torch.zeros(2, 7, 3))
        >>> tuple(y.shape), tuple(h.shape)
        ((2, 7, 5), (2, 2, 5))
        >>> layer.feedback = "dsf"
    """

    __signature__ = _signature()


class LSTM(RecurrentLayer, nn.LSTM):
    """torch.nn.LSTM with a feedback rule.

    ``c[t] = f c[t-1] + i g``, ``h[t] = o tanh(c[t])``, with the forward pass of torch.nn.LSTM. The gradient is exact by
    default. Under an approximate rule those of h and c are two scans,
    ``delta_h[t] = e_h[t] + D_h * delta_h[t+1]`` and
    ``gamma[t] = e_c[t] + o (1 - tanh(c)^2) * delta_h[t] + D_c * gamma[t+1]``, where e comes from outside the recurrence
    and D is the diagonal of the rule (arXiv 2503.23104). With ``proj_size``, ``h[t] = W_hr (o tanh(c[t]))``, and
    ``W_hr^T delta_h[t]`` takes the place of ``delta_h[t]`` in gamma.

    Args:
        input_size: I, number of input features.
        hidden_size: H, number of features of c, and of h without ``proj_size``.
        num_layers: L, number of stacked layers.
        bias: whether the layer has b_ih and b_hh.
        batch_first: inputs and outputs are (B, T, .) instead of (T, B, .).
        dropout: dropout probability between layers in training.
        bidirectional: add a reverse direction to every layer.
        proj_size: P, number of features of h, below H; 0 is no projection.
        device: device of the parameters.
        dtype: dtype of the parameters.
        feedback: the gradient rule, in any spelling of ``Feedback``; settable as ``layer.feedback``. A tensor diagonal
            covers the concatenated states (h, c) and has the shape (2H,), with ``proj_size`` (P + H,).

    Gradient: that of the rule; exact under ``"bptt"``, the default, ``"torch"`` and with k >= T corrections.

    Raises:
        ValueError: an unknown rule.

    Cost: under an approximate rule backward O(H) per step for the states, and three matrix products over all steps at
        once; under ``"bptt"`` one product more at every step. With ``proj_size`` two smaller products more, and under
        ``"jacobian"`` one product (T * B, H) x (H, P) per gate.

    Example:
        >>> import torch
        >>> layer = LSTM(3, 5, bidirectional=True)
        >>> y, (h, c) = layer(torch.zeros(7, 2, 3))
        >>> tuple(y.shape), tuple(c.shape)
        ((7, 2, 10), (2, 2, 5))
    """

    __signature__ = _signature(proj_size=("bidirectional", 0))
