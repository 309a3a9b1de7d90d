"""RNN, GRU and LSTM: torch.nn's layers with a feedback rule."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from statefeed.backends import BACKENDS, flatten_weights
from statefeed.cells import CELLS, Cell, State
from statefeed.feedback import Feedback, FeedbackLike, as_feedback
from statefeed.feedback.value import check_keyword_only
from statefeed.recurrence import autocast_dtype
from statefeed.stack import RecurrentStack

_TORCHSCRIPT = (
    "TorchScript cannot hold a feedback rule: call statefeed.restore(model) first and script or trace torch.nn's layers"
)

_COMPILED_LSTM = (
    'torch.compile cannot train the LSTM of torch.nn: set feedback to "bptt", which is exact too, or compile the model '
    "without the layer"
)


class RecurrentLayer(RecurrentStack, nn.RNNBase):
    """A stack of a cell that torch has: torch.nn.RNNBase's constructor and parameters, and torch's path."""

    _torchscript = _TORCHSCRIPT

    def __init__(self, *args: Any, feedback: FeedbackLike = "bptt", **kwargs: Any) -> None:
        check_keyword_only(type(self).__name__, args)
        super().__init__(*args, **kwargs)
        # A Feedback, because nn.Module would register a Parameter under this name and bypass the property.
        self.feedback = as_feedback(feedback)

    @property
    def feedback_cell(self) -> Cell:
        return CELLS[self.mode.lower()]

    def unsupported_reason(self, rule: Feedback) -> str | None:
        """Why the layer cannot run under a rule, in one sentence; None if it can."""
        if self.proj_size:
            return (
                f"proj_size must be 0, got {self.proj_size}: the feedback needs h and c of one width; "
                "torch.nn.LSTM has it"
            )
        return super().unsupported_reason(rule)

    def reset_parameters(self) -> None:
        """Draw the weights again, as torch's layers do, and forget the diagonal that was learned under them."""
        super().reset_parameters()
        self.reset_diagonal()

    def flatten_parameters(self) -> None:
        """Lay the weights in memory as cuDNN reads them: one buffer per layer, one for all layers under an exact rule.

        An exact rule runs torch's own path there, all layers in one call; the other rules run layer by layer.
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
        weight = next(self.parameters(), None)  # None where a hypernetwork sets the weights
        return "_feedback" in self.__dict__ and not self._feedback.exact and weight is not None and weight.is_cuda

    def _rule_changed(self) -> None:
        self.flatten_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.feedback_repr()}"

    def _backend(self, input: Tensor | PackedSequence, hx: Any, weights: list[list[Tensor]]) -> str | None:
        """torch's own layer runs without autograd, in torch.export, and an exact rule that no kernels run."""
        without_grad = not torch.is_grad_enabled() and not self._layer_by_layer
        if without_grad or torch.compiler.is_exporting() or self.torch_path_reason(input) is not None:
            return None
        name = super()._backend(input, hx, weights)
        return None if name is None or (self._feedback.exact and BACKENDS[name].fallback) else name

    def torch_path_reason(self, input: Tensor | PackedSequence) -> str | None:
        """Why torch's own layer runs a call, whether kernels support it or not; None if a backend may run it."""
        if self._feedback.through_torch:
            return '"torch" selects torch\'s own layer'
        if self._feedback.exact and _steps(input, self.batch_first) == 1 and not torch.compiler.is_compiling():
            return "one step has no recurrence to fuse, and torch's own path costs less per call"
        return None

    def _torch_path(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if compiling and torch.is_grad_enabled() and self.mode == "LSTM":
            raise RuntimeError(_COMPILED_LSTM)
        if self.mode == "LSTM" and isinstance(input, Tensor) and not torch.is_grad_enabled() and _lacks_bf16(input):
            return self._in_float32(input, hx)
        return super(RecurrentStack, self).forward(input, hx)  # type: ignore[no-any-return]

    def _in_float32(self, input: Tensor, hx: Any) -> tuple[Any, Any]:
        """torch's path without the autocast in force, its results in the dtype of that autocast."""
        dtype = self._weights_of(0)[0].dtype
        with torch.autocast("cpu", enabled=False):
            state = None if hx is None else tuple(s.to(dtype) for s in hx)
            y, final = super(RecurrentStack, self).forward(input.to(dtype), state)
        return y.to(torch.bfloat16), tuple(s.to(torch.bfloat16) for s in final)

    def _check(self, x: Tensor, state: State, batch_sizes: Tensor | None) -> None:
        self.check_forward_args(x, self._as_hx(state), batch_sizes)


def _steps(input: Tensor | PackedSequence, batch_first: bool) -> int:
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes)
    return input.shape[1 if batch_first and input.dim() == 3 else 0] if input.dim() else 0


def _lacks_bf16(x: Tensor) -> bool:
    """Whether oneDNN, which runs torch's LSTM on padded batches, raises under the bfloat16 autocast in force."""
    return x.is_cpu and autocast_dtype(x) == torch.bfloat16 and not _onednn_has_bf16()


@functools.cache
def _onednn_has_bf16() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not available or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# As for ``native.unavailable``: a constant to torch.compile.
_onednn_has_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _signature(**more: tuple[str, Any]) -> inspect.Signature:
    """The constructor's as torch.nn documents it, with ``feedback``; ``more`` is (the argument it follows, default)."""
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

    ``h[t] = act(x[t] W_ih^T + b_ih + h[t-1] W_hh^T + b_hh)``, forward exactly as torch.nn.RNN; backward
    ``delta[t] = e[t] + D[t+1] * delta[t+1]`` and local gradients (arXiv 2503.23104).

    Args:
        input_size: I, features of one step.
        hidden_size: H, features of the state.
        num_layers: L, stacked layers.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether there are b_ih and b_hh.
        batch_first: (B, T, .) instead of (T, B, .).
        dropout: probability, between layers, in training.
        bidirectional: a second direction in every layer.
        device: of the parameters.
        dtype: of the parameters.
        feedback: the gradient rule, in any spelling of ``Feedback`` but ``"gate"``; settable as ``layer.feedback``.

    Gradient: as the rule says; exact under ``"bptt"``, the default, ``"torch"`` and for k >= T corrections.

    Raises:
        ValueError: an unknown rule, or ``"gate"``: an RNN has no direct path.

    Cost: backward per step O(H) for the state, and three products over all steps at once.

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

    ``h[t] = (1 - z) n + z h[t-1]``, ``n = tanh(W_in x + b_in + r (W_hn h[t-1] + b_hn))``, forward exactly as
    torch.nn.GRU; backward ``delta[t] = e[t] + D[t+1] * delta[t+1]`` and local gradients (arXiv 2503.23104).

    Args:
        input_size: I, features of one step.
        hidden_size: H, features of the state.
        num_layers: L, stacked layers.
        bias: whether there are b_ih and b_hh.
        batch_first: (B, T, .) instead of (T, B, .).
        dropout: probability, between layers, in training.
        bidirectional: a second direction in every layer.
        device: of the parameters.
        dtype: of the parameters.
        feedback: the gradient rule, in any spelling of ``Feedback``; settable as ``layer.feedback``.

    Gradient: as the rule says; exact under ``"bptt"``, the default, ``"torch"`` and for k >= T corrections.

    Raises:
        ValueError: an unknown rule.

    Cost: backward per step O(H) for the state, and large products over all steps at once.

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

    ``c[t] = f c[t-1] + i g``, ``h[t] = o tanh(c[t])``, forward exactly as torch.nn.LSTM; backward two scans,
    ``delta_h[t] = e_h[t] + D_h * delta_h[t+1]`` and ``gamma[t] = e_c[t] + o (1 - tanh(c)^2) * delta_h[t] + D_c *
    gamma[t+1]``, and local gradients (arXiv 2503.23104).

    Args:
        input_size: I, features of one step.
        hidden_size: H, features of h and of c.
        num_layers: L, stacked layers.
        bias: whether there are b_ih and b_hh.
        batch_first: (B, T, .) instead of (T, B, .).
        dropout: probability, between layers, in training.
        bidirectional: a second direction in every layer.
        proj_size: only 0.
        device: of the parameters.
        dtype: of the parameters.
        feedback: the gradient rule, in any spelling of ``Feedback``; settable as ``layer.feedback``. A tensor diagonal
            runs over (h, c) joined and has the shape (2H,).

    Gradient: as the rule says; exact under ``"bptt"``, the default, ``"torch"`` and for k >= T corrections.

    Raises:
        ValueError: an unknown rule, or a proj_size.

    Cost: backward per step O(H) for the states, and large products over all steps at once.

    Example:
        >>> import torch
        >>> layer = LSTM(3, 5, bidirectional=True)
        >>> y, (h, c) = layer(torch.zeros(7, 2, 3))
        >>> tuple(y.shape), tuple(c.shape)
        ((7, 2, 10), (2, 2, 5))
    """

    __signature__ = _signature(proj_size=("bidirectional", 0))
