"""RNN, GRU and LSTM: torch.nn's layers with a feedback rule; input forms, layers, directions, packing."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from statefeed.backends import choose, flatten_weights
from statefeed.cells import CELLS, Cell, State
from statefeed.feedback import Feedback, FeedbackLike, as_feedback
from statefeed.layout import Layout, segment
from statefeed.mixin import FeedbackLayer
from statefeed.recurrence import Direction, recurrence

_TORCHSCRIPT = (
    "TorchScript cannot hold a feedback rule: call statefeed.restore(model) first and script or trace torch.nn's layers"
)


class RecurrentLayer(FeedbackLayer, nn.RNNBase):
    """The forward pass of torch.nn.RNNBase, layer by layer, each under the feedback rule."""

    def __init__(self, *args: Any, feedback: FeedbackLike = "bptt", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A Feedback, because nn.Module would register a Parameter under this name and bypass the property.
        self.feedback = as_feedback(feedback)

    @property
    def feedback_cell(self) -> Cell:
        return CELLS[self.mode.lower()]

    @property
    def _state_size(self) -> int:
        return sum(self.feedback_cell.state_widths(self.hidden_size))

    @property
    def _feedback_rows(self) -> int:
        return self.num_layers * (2 if self.bidirectional else 1)

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
        return "_feedback" in self.__dict__ and not self._feedback.exact and next(self.parameters()).is_cuda

    def _weights_of(self, layer: int) -> list[Tensor]:
        """The weights of a layer, of the reverse direction after those of the forward one."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        return [getattr(self, f"{name}_l{layer}{suffix}") for suffix in suffixes for name in names]

    def _rule_changed(self) -> None:
        self.flatten_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.feedback_repr()}"

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """What torch.nn's layer of the same name returns; its gradient follows ``feedback``.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx: initial state (L * directions, B, H), or (L * directions, H) unbatched; (h, c) for an
                LSTM; zeros if None.
            lengths: (B,), steps of every row that count, instead of packing: outputs after the end are zero, and the
                final state is that of each row's last step.
            resets: bool, (T, B), or (B, T) with batch_first, true where a new sequence begins inside a row: the state
                before that step is zero, and no gradient passes there. The reverse direction is split there too.

        Returns:
            outputs and final state, as torch.nn's layer.

        Gradient: approximate unless ``feedback`` is exact or has k >= T corrections. Without autograd
            (``torch.no_grad``) and in ``torch.export`` torch's own path runs.

        Raises:
            RuntimeError: traced by TorchScript while autograd is on; ``statefeed.restore`` the model first.
        """
        if lengths is not None or resets is not None:
            return self._forward_segments(input, hx, lengths, resets)
        without_grad = not torch.is_grad_enabled() and not self._layer_by_layer
        if without_grad or torch.compiler.is_exporting() or self._runs_torch(input):
            return super().forward(input, hx)  # type: ignore[no-any-return]
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(_TORCHSCRIPT)
        packed = isinstance(input, PackedSequence)
        if isinstance(input, PackedSequence):
            x, batch_sizes, sorted_indices, unsorted_indices = input
            unbatched = False
            layout = Layout(len(batch_sizes), int(batch_sizes[0]), batch_sizes)
        else:
            batch_sizes, sorted_indices, unsorted_indices = None, None, None
            x, hx, unbatched = self._batched(input, hx)
            time, batch = (1, 0) if self.batch_first else (0, 1)
            layout = Layout(x.shape[time], x.shape[batch])
        if hx is None:
            shape = (self._feedback_rows, layout.B, self.hidden_size)
            zeros = torch.zeros(shape, dtype=x.dtype, device=x.device)
            hx = self._as_hx((zeros,) * len(self.feedback_cell.states))
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(x, hx, batch_sizes)

        y, final = self._layers(x if packed or not self.batch_first else x.transpose(0, 1), layout, self._as_state(hx))
        hidden = self._as_hx(final)
        if packed:
            return (
                PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices),
                self.permute_hidden(hidden, unsorted_indices),
            )
        if self.batch_first:
            y = y.transpose(0, 1)
        if unbatched:
            y = y.squeeze(0 if self.batch_first else 1)
            hidden = self._as_hx(tuple(s.squeeze(1) for s in final))
        return y, hidden

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One step of a stream: what ``forward`` returns for a sequence of length 1, without its time axis.

        ``y[t], s[t] = step(x[t], s[t-1])``; steps in a row are the sequence at once. torch.nn's plain layer has no
        ``step``: after ``statefeed.restore`` give it the sequence of length 1.

        Args:
            x: (B, I), the input of this step.
            state: (L, B, H), a pair of them for an LSTM, as the step before returned it; zeros if None.

        Returns:
            y (B, H), and the state to hand to the next step.

        Gradient: none; train on whole sequences.

        Raises:
            ValueError: a bidirectional layer, which needs the future, or x of another rank.

        Cost: one step of torch's own layer.

        Example:
            >>> layer = GRU(3, 5, num_layers=2)
            >>> x = torch.randn(7, 1, 3)
            >>> y, state = layer.step(x[0])
            >>> for t in range(1, 7):
            ...     y, state = layer.step(x[t], state)
            >>> torch.allclose(y, layer(x)[0][-1], atol=1e-6)
            True
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no step: its reverse direction begins at the end of the stream")
        if x.dim() != 2:
            raise ValueError(f"x must have the shape (B, I), the input of one step, got {tuple(x.shape)}")
        time = 1 if self.batch_first else 0
        with torch.no_grad():
            y, state = self(x.unsqueeze(time), state)
        return y.squeeze(time), state

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(_TORCHSCRIPT)

    def _runs_torch(self, input: Tensor | PackedSequence) -> bool:
        """Whether the rule is exact and no backend has kernels for it on this input."""
        rule, cell = self._feedback, self.feedback_cell
        if not rule.exact or rule.through_torch:
            return rule.exact
        x = input.data if isinstance(input, PackedSequence) else input
        return choose(cell, (x, *self.parameters()), exact=True).name == "reference"

    def _as_state(self, hx: Any) -> State:
        return (hx,) if isinstance(hx, Tensor) else tuple(hx)

    def _as_hx(self, state: State) -> Any:
        return state[0] if len(state) == 1 else state

    def _forward_segments(
        self, x: Tensor | PackedSequence, hx: Any, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Every segment as a packed sequence of its own, then scattered back to the rows."""
        if isinstance(x, PackedSequence) or x.dim() != 3:
            got = "a PackedSequence" if isinstance(x, PackedSequence) else f"{x.dim()}D"
            raise ValueError(f"lengths and resets need a padded batch as input, a 3D tensor, got {got}")
        for name, value in (("lengths", lengths), ("resets", resets)):
            if not (value is None or isinstance(value, Tensor)):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        x, hx, _ = self._batched(x, hx)
        if self.batch_first:
            x, resets = x.transpose(0, 1), None if resets is None else resets.T
        (T, B), directions = x.shape[:2], 2 if self.bidirectional else 1
        segments = segment(T, B, lengths, resets, x.device)
        if hx is not None:
            hx = self._as_hx(tuple(segments.initial(s, directions) for s in self._as_state(hx)))
        packed = PackedSequence(x.flatten(0, 1)[segments.gather_index], segments.batch_sizes)
        y, final = self.forward(packed, hx)
        out = y.data.new_zeros(T * B, y.data.shape[-1]).index_copy(0, segments.gather_index, y.data)
        out = out.unflatten(0, (T, B))
        ends = self._as_hx(tuple(segments.final(s, directions) for s in self._as_state(final)))
        return out.transpose(0, 1) if self.batch_first else out, ends

    def _batched(self, x: Tensor, hx: Any) -> tuple[Tensor, Any, bool]:
        """Input and initial state with a batch axis, and whether one had to be added."""
        if x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D instead")
        unbatched = x.dim() == 2
        if hx is None:
            return x.unsqueeze(0 if self.batch_first else 1) if unbatched else x, None, unbatched
        parts = len(self.feedback_cell.states)
        if parts > 1 and not unbatched:
            if isinstance(hx, Tensor):
                raise TypeError(f"hx of an LSTM must be a pair (h, c), got one tensor of shape {tuple(hx.shape)}")
            if len(hx) != parts:
                raise RuntimeError(f"hx of an LSTM must be a pair (h, c), got {len(hx)} of them")
        state = self._as_state(hx)
        for s in state:
            if s.dim() != x.dim():
                form = "unbatched 2-D" if unbatched else "batched 3-D"
                raise RuntimeError(f"For {form} input, hx should also be {x.dim()}-D but got {s.dim()}-D tensor")
        if unbatched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            hx = self._as_hx(tuple(s.unsqueeze(1) for s in state))
        return x, hx, unbatched

    def _layers(self, x: Tensor, layout: Layout, state: State) -> tuple[Tensor, State]:
        """All layers and directions over x (T, B, I) or packed rows; state (L * directions, B, H) per part."""
        rule, cell = self._feedback, self.feedback_cell
        if not (rule.exact or rule.corrections) and any(s.requires_grad for s in state):
            warnings.warn(
                f'the initial state requires grad under feedback "{rule}": without corrections its gradient is '
                'D[1] * delta[1], not the exact one (zero under "ft-bptt")',
                stacklevel=5,
            )
        count = 2 if self.bidirectional else 1
        backend = choose(cell, (x, *state, *self.parameters()), rule.exact).name
        finals: list[State] = []
        for layer in range(self.num_layers):
            weights = self._weights_of(layer)
            each = len(weights) // count
            directions = [
                Direction(
                    state=tuple(s[layer * count + k] for s in state),
                    weights=tuple(weights[k * each : (k + 1) * each]),
                    rule=self._rules[layer * count + k],
                    learned=self.learned_state(layer * count + k),
                )
                for k in range(count)
            ]
            x, found = recurrence(cell, backend, x, layout, directions)
            finals += found
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))


def _signature(**more: tuple[str, Any]) -> inspect.Signature:
    """The constructor's as torch.nn documents it, with ``feedback``; ``more`` is (the argument it follows, default)."""
    defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
    arguments: dict[str, Any] = {"input_size": inspect.Parameter.empty, "hidden_size": inspect.Parameter.empty}
    for name, default in defaults.items():
        arguments[name] = default
        arguments |= {added: value for added, (after, value) in more.items() if after == name}
    arguments |= {"device": None, "dtype": None}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, default=default) for name, default in arguments.items()]
    return inspect.Signature(
        [*parameters, inspect.Parameter("feedback", inspect.Parameter.KEYWORD_ONLY, default="bptt")]
    )


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
