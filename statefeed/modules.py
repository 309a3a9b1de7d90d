"""RNN, GRU and LSTM: torch.nn's layers with a feedback rule; layers, directions, batches and packing live here."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from statefeed import cells
from statefeed.feedback import Feedback, FeedbackLike
from statefeed.pieces import cut
from statefeed.recurrence import Calibration, recurrence, why_not_fused

_TORCHSCRIPT = (
    "TorchScript cannot hold a feedback rule: call statefeed.restore(model) first and script or trace torch.nn's layers"
)


def refusal(layer: nn.RNNBase, feedback: Feedback) -> str | None:
    """Why a layer cannot run under a rule, in one sentence; None if it can."""
    if layer.proj_size:
        return (
            f"proj_size must be 0, got {layer.proj_size}: the feedback needs h and c of one width; torch.nn.LSTM has it"
        )
    if feedback.diagonal == "gate" and isinstance(layer, nn.RNN):
        return 'feedback "gate" needs a direct path between states and an RNN has none; use "jacobian" or "calibrated"'
    size, rows = (2 if isinstance(layer, nn.LSTM) else 1) * layer.hidden_size, _rows(layer)
    if isinstance(feedback.diagonal, Tensor) and feedback.diagonal.shape not in ((size,), (rows, size)):
        return (
            f"the feedback diagonal must have one value per unit of the state, {size} here (an LSTM counts h and c, "
            f"2H), or a row of them for every layer and direction, {rows} here, got {tuple(feedback.diagonal.shape)}"
        )
    return None


def _rows(layer: nn.RNNBase) -> int:
    return layer.num_layers * (2 if layer.bidirectional else 1)


class _WithFeedback(nn.RNNBase):
    """The forward pass of torch.nn.RNNBase, layer by layer, each under the feedback rule."""

    _feedback: Feedback
    _rules: tuple[Feedback, ...]  # of every layer and direction

    def __init__(self, *args: Any, feedback: FeedbackLike, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Made a rule here: nn.Module would register a Parameter under this name, past the property.
        self.feedback = feedback if isinstance(feedback, Feedback) else Feedback(feedback)

    @property
    def feedback(self) -> Feedback:
        """The rule of the backward pass; settable at any time, in every spelling of ``Feedback``."""
        return self._feedback

    @feedback.setter
    def feedback(self, rule: FeedbackLike) -> None:
        feedback = rule if isinstance(rule, Feedback) else Feedback(rule)
        reason = refusal(self, feedback)
        if reason is not None:
            raise ValueError(reason)
        if feedback.diagonal in ("calibrated", "fitted") and "diagonal" not in self._buffers:
            weight: Tensor = getattr(self, "weight_hh_l0")  # noqa: B009
            diagonal = weight.new_zeros(_rows(self), self._states * self.hidden_size)
            self.register_buffer("diagonal", diagonal, persistent=False)
            updates = torch.zeros(_rows(self), dtype=torch.int64, device=weight.device)
            self.register_buffer("diagonal_updates", updates, persistent=False)
        self._feedback = feedback
        self._rules = tuple(feedback.row(k) for k in range(_rows(self)))

    def reset_parameters(self) -> None:
        """Draw the weights anew, as torch's layers do, and forget the diagonal that was learnt under them."""
        super().reset_parameters()
        for name in ("diagonal", "diagonal_updates"):
            if name in self._buffers:
                self._buffers[name].zero_()  # type: ignore[union-attr]

    @property
    def _states(self) -> int:
        return 2 if isinstance(self, nn.LSTM) else 1

    @property
    def _cell(self) -> cells.Cell:
        return {"GRU": cells.GRU, "LSTM": cells.LSTM, "RNN_TANH": cells.RNN_TANH, "RNN_RELU": cells.RNN_RELU}[self.mode]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, feedback={str(self._feedback)!r}"

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
            lengths: (B,), steps of every row that count, instead of packing: outputs behind the end are zero, and the
                final state is that of each row's last step.
            resets: bool, (T, B), or (B, T) with batch_first, true where a new sequence begins inside a row: the state
                before that step is zero, and no gradient passes there. The reverse direction is cut at the same places.

        Returns:
            outputs and final state, as torch.nn's layer.

        Gradient: approximate unless ``feedback`` is exact or has k >= T corrections. Without autograd
            (``torch.no_grad``) and in ``torch.export`` torch's own path runs.

        Raises:
            RuntimeError: traced by TorchScript while autograd is on; ``statefeed.restore`` the model first.
        """
        if lengths is not None or resets is not None:
            return self._forward_pieces(input, hx, lengths, resets)
        if not torch.is_grad_enabled() or torch.compiler.is_exporting() or self._exact_through_torch(input):
            return super().forward(input, hx)  # type: ignore[no-any-return]
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(_TORCHSCRIPT)
        if isinstance(input, PackedSequence):
            x, batch_sizes, sorted_indices, unsorted_indices = input
            B, unbatched = int(batch_sizes[0]), False
        else:
            x, batch_sizes, sorted_indices, unsorted_indices = input, None, None, None
            x, hx, unbatched = self._batched(x, hx)
            B = x.shape[0 if self.batch_first else 1]
        if hx is None:
            shape = (_rows(self), B, self.hidden_size)
            zeros = torch.zeros(shape, dtype=x.dtype, device=x.device)
            hx = (zeros, zeros) if self._states == 2 else zeros
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(x, hx, batch_sizes)

        states = hx if self._states == 2 else (hx,)
        dense = batch_sizes is None
        y, final = self._layers(x.transpose(0, 1) if dense and self.batch_first else x, batch_sizes, states)
        hidden: Any = final if self._states == 2 else final[0]
        if not dense:
            packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(hidden, unsorted_indices)
        if self.batch_first:
            y = y.transpose(0, 1)
        if unbatched:
            y = y.squeeze(0 if self.batch_first else 1)
            hidden = tuple(s.squeeze(1) for s in hidden) if self._states == 2 else hidden.squeeze(1)
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

    def _exact_through_torch(self, input: Tensor | PackedSequence) -> bool:
        rule, x = self._feedback, input.data if isinstance(input, PackedSequence) else input
        fused = rule.diagonal == "fused-bptt" and why_not_fused(x, *self.parameters(), exact=True) is None
        return rule.exact and not fused

    def _forward_pieces(
        self, x: Tensor | PackedSequence, hx: Any, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Every piece as a packed sequence of its own, then rows put back together."""
        if isinstance(x, PackedSequence) or x.dim() != 3:
            got = "a PackedSequence" if isinstance(x, PackedSequence) else f"{x.dim()}D"
            raise ValueError(f"lengths and resets need a padded batch as input, a 3D tensor, got {got}")
        for name, given in (("lengths", lengths), ("resets", resets)):
            if not (given is None or isinstance(given, Tensor)):
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        x, hx, _ = self._batched(x, hx)
        if self.batch_first:
            x, resets = x.transpose(0, 1), None if resets is None else resets.T
        (T, B), directions = x.shape[:2], 2 if self.bidirectional else 1
        pieces = cut(T, B, lengths, resets, x.device)
        states = () if hx is None else (hx if self._states == 2 else (hx,))
        inner = tuple(pieces.initial(s, directions) for s in states)
        packed = PackedSequence(x.flatten(0, 1)[pieces.source], pieces.batch_sizes)
        y, final = self.forward(packed, None if hx is None else inner if self._states == 2 else inner[0])
        out = y.data.new_zeros(T * B, y.data.shape[-1]).index_copy(0, pieces.source, y.data).unflatten(0, (T, B))
        ends = tuple(pieces.final(s, directions) for s in (final if self._states == 2 else (final,)))
        return out.transpose(0, 1) if self.batch_first else out, ends if self._states == 2 else ends[0]

    def _batched(self, x: Tensor, hx: Any) -> tuple[Tensor, Any, bool]:
        """Input and initial state with a batch axis, and whether one had to be added."""
        if x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D instead")
        unbatched = x.dim() == 2
        if self._states == 2 and hx is not None and not unbatched:
            if isinstance(hx, Tensor):
                raise TypeError(f"hx of an LSTM must be a pair (h, c), got one tensor of shape {tuple(hx.shape)}")
            if len(hx) != 2:
                raise RuntimeError(f"hx of an LSTM must be a pair (h, c), got {len(hx)} of them")
        for s in () if hx is None else (hx if self._states == 2 else (hx,)):
            if s.dim() != x.dim():
                form = "unbatched 2-D" if unbatched else "batched 3-D"
                raise RuntimeError(f"For {form} input, hx should also be {x.dim()}-D but got {s.dim()}-D tensor")
        if unbatched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            if hx is not None:
                hx = tuple(s.unsqueeze(1) for s in hx) if self._states == 2 else hx.unsqueeze(1)
        return x, hx, unbatched

    def _layers(
        self, x: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers and directions over x (T, B, I) or packed rows; states (L * directions, B, H)."""
        rule = self._feedback
        if not (rule.exact or rule.corrections) and any(s.requires_grad for s in states):
            warnings.warn(
                f'the initial state requires grad under feedback "{self._feedback}": without corrections its gradient '
                'is D[1] * delta[1], not the exact one (zero under "ft-bptt")',
                stacklevel=5,
            )
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        backwards = _reversal(batch_sizes, x.device) if self.bidirectional and batch_sizes is not None else None
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in suffixes:
                k = len(finals)
                weights = [getattr(self, f"{name}_l{layer}{suffix}") for name in names]
                y, final = recurrence(
                    self._cell,
                    self._rules[k],
                    self._calibration(k),
                    _reverse(x, backwards) if suffix else x,
                    batch_sizes,
                    tuple(s[k] for s in states),
                    weights,
                )
                outputs.append(_reverse(y, backwards) if suffix else y)
                finals.append(final)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))

    def _calibration(self, k: int) -> Calibration | None:
        rule = self._feedback.diagonal
        if rule not in ("calibrated", "fitted"):
            return None
        return Calibration(self.diagonal[k], self.diagonal_updates[k], self.training, rule == "fitted")  # type: ignore[index]


def _reverse(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows.flip(0) if index is None else rows[index]


def _reversal(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """Where each packed row lies when every sequence is reversed within its own length; its own inverse."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    sequence = torch.cat([torch.arange(int(n)) for n in batch_sizes])
    t = torch.repeat_interleave(torch.arange(len(batch_sizes)), batch_sizes)
    lengths = (batch_sizes[:, None] > torch.arange(int(batch_sizes[0]))).sum(0)
    return (starts[lengths[sequence] - 1 - t] + sequence).to(device)


class RNN(_WithFeedback, nn.RNN):
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

    Gradient: approximate, as the rule says; exact under ``"bptt"``, ``"fused-bptt"`` and for k >= T corrections.

    Raises:
        ValueError: a rule that is none, or ``"gate"``: an RNN has no direct path.

    Cost: backward per step O(H) for the state, and three products over all steps at once.

    Example:
        >>> layer = RNN(3, 5, feedback="jacobian")
        >>> y, h = layer(torch.zeros(7, 2, 3))
        >>> tuple(y.shape), tuple(h.shape)
        ((7, 2, 5), (1, 2, 5))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        feedback: FeedbackLike = "dsf",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            feedback=feedback,
        )


class GRU(_WithFeedback, nn.GRU):
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

    Gradient: approximate, as the rule says; exact under ``"bptt"``, ``"fused-bptt"`` and for k >= T corrections.

    Raises:
        ValueError: a rule that is none.

    Cost: backward per step O(H) for the state, and large products over all steps at once.

    Example:
        >>> layer = GRU(3, 5, num_layers=2, batch_first=True, feedback="gate+1")
        >>> y, h = layer(torch.zeros(2, 7, 3))
        >>> tuple(y.shape), tuple(h.shape)
        ((2, 7, 5), (2, 2, 5))
        >>> layer.feedback = "dsf"
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        feedback: FeedbackLike = "dsf",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            feedback=feedback,
        )


class LSTM(_WithFeedback, nn.LSTM):
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

    Gradient: approximate, as the rule says; exact under ``"bptt"``, ``"fused-bptt"`` and for k >= T corrections.

    Raises:
        ValueError: a rule that is none, or a proj_size.

    Cost: backward per step O(H) for the states, and large products over all steps at once.

    Example:
        >>> layer = LSTM(3, 5, bidirectional=True)
        >>> y, (h, c) = layer(torch.zeros(7, 2, 3))
        >>> tuple(y.shape), tuple(c.shape)
        ((7, 2, 10), (2, 2, 5))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        feedback: FeedbackLike = "dsf",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            feedback=feedback,
        )
