"""Layers and directions of one cell over every form of input: what RNN, GRU, LSTM and CellLayer share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from statefeed.backends import choose
from statefeed.cells.protocol import Cell, State
from statefeed.layout import Layout, segment
from statefeed.mixin import FeedbackLayer, complex_reason
from statefeed.recurrence import Direction, recurrence
from statefeed.transforms import NO_EXPANDED_WEIGHTS, is_expanded, traced
from statefeed.user_warning import warn


class RecurrentStack(FeedbackLayer):
    """Stacked layers in one or two directions, each under the feedback rule; the forward pass of torch.nn.RNNBase.

    A subclass has torch.nn.GRU's attributes and parameter names.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    _torchscript: ClassVar[str]  # why TorchScript cannot have the layer

    @property
    def feedback_cell(self) -> Cell:
        raise NotImplementedError

    @property
    def _state_size(self) -> int:
        return sum(self.feedback_cell.state_widths(self.hidden_size))

    @property
    def _feedback_rows(self) -> int:
        return self.num_layers * (2 if self.bidirectional else 1)

    def _weights_of(self, layer: int) -> list[Tensor]:
        """The weights of a layer, of the reverse direction after those of the forward one."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        return [getattr(self, f"{name}_l{layer}{suffix}") for suffix in suffixes for name in names]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, ...] | None = None,
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
            (``torch.no_grad``) and in ``torch.export`` torch's own path runs, where torch has the cell.

        Raises:
            RuntimeError: traced by TorchScript while autograd is on; ``statefeed.restore`` the model first.
        """
        if isinstance(input, fx.Proxy):
            return traced(input, self, RecurrentStack, hx, lengths=lengths, resets=resets)
        if lengths is not None or resets is not None:
            return self._forward_segments(input, hx, lengths, resets)
        return self._forward(input, hx)

    def _forward(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        """The forward pass on a padded, packed or unbatched input; not overridden by a subclass's ``forward``."""
        weights = [self._weights_of(layer) for layer in range(self.num_layers)]
        backend = self._backend(input, hx, weights)
        if backend is None:
            return self._torch_path(input, hx)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(self._torchscript)
        if is_expanded(weights[0][0]):
            raise RuntimeError(NO_EXPANDED_WEIGHTS)
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
            shape = (self._feedback_rows, layout.B)
            widths = self.feedback_cell.state_widths(self.hidden_size)
            state = tuple(torch.zeros((*shape, width), dtype=x.dtype, device=x.device) for width in widths)
        else:
            state = _permute(self._as_state(hx), sorted_indices)
        self._check(x, state, batch_sizes)
        if x.is_complex() and not self._feedback.exact:
            raise ValueError(complex_reason(self._feedback, x.dtype))

        rows = x if packed or not self.batch_first else x.transpose(0, 1)
        y, final = self._layers(backend, rows, layout, state, weights)
        if packed:
            return (
                PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices),
                self._as_hx(_permute(final, unsorted_indices)),
            )
        if self.batch_first:
            y = y.transpose(0, 1)
        if unbatched:
            y = y.squeeze(0 if self.batch_first else 1)
            final = tuple(s.squeeze(1) for s in final)
        return y, self._as_hx(final)

    def _backend(self, input: Tensor | PackedSequence, hx: Any, weights: list[list[Tensor]]) -> str | None:
        """The backend that runs a call, chosen once for all layers; None for torch's own layer."""
        x = input.data if isinstance(input, PackedSequence) else input
        state = () if hx is None else self._as_state(hx)
        tensors = (x, *state, *(w for of_layer in weights for w in of_layer))
        return choose(self.feedback_cell, tensors, self._feedback.exact).name

    def torch_path_reason(self, input: Tensor | PackedSequence) -> str | None:
        """Why torch's own layer runs a call; None if a backend may run it, as it does where torch lacks the cell."""
        return None

    def _torch_path(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        """The forward pass of torch's own layer."""
        raise NotImplementedError

    def _check(self, x: Tensor, state: State, batch_sizes: Tensor | None) -> None:
        """Raise unless x and the initial state have the rank, widths and dtype of the layer."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(self._torchscript)

    def step(self, x: Tensor, state: Tensor | tuple[Tensor, ...] | None = None) -> tuple[Tensor, Any]:
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
            >>> import statefeed as sf
            >>> layer = sf.GRU(3, 5, num_layers=2)
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
        padded = x
        if self.batch_first:
            x, resets = x.transpose(0, 1), None if resets is None else resets.T
        (T, B), directions = x.shape[:2], 2 if self.bidirectional else 1
        segments = segment(T, B, lengths, resets, x.device)
        if not B:
            return self._forward(padded, hx)
        if hx is not None:
            hx = self._as_hx(tuple(segments.initial(s, directions) for s in self._as_state(hx)))
        packed = PackedSequence(x.flatten(0, 1)[segments.gather_index], segments.batch_sizes)
        y, final = self._forward(packed, hx)
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
        states = self.feedback_cell.states
        parts = len(states)
        if parts > 1 and not unbatched:
            kind = "pair" if parts == 2 else "tuple"
            form = f"hx of an {self.feedback_cell.name.upper()} must be a {kind} ({', '.join(states)})"
            if isinstance(hx, Tensor):
                raise TypeError(f"{form}, got one tensor of shape {tuple(hx.shape)}")
            if len(hx) != parts:
                raise RuntimeError(f"{form}, got {len(hx)} of them")
        state = self._as_state(hx)
        for s in state:
            if s.dim() != x.dim():
                form = "unbatched 2-D" if unbatched else "batched 3-D"
                raise RuntimeError(f"For {form} input, hx should also be {x.dim()}-D but got {s.dim()}-D tensor")
        if unbatched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            hx = self._as_hx(tuple(s.unsqueeze(1) for s in state))
        return x, hx, unbatched

    def _layers(
        self, backend: str, x: Tensor, layout: Layout, state: State, weights: list[list[Tensor]]
    ) -> tuple[Tensor, State]:
        """All layers and directions over x (T, B, I) or packed rows; state (L * directions, B, H) per part."""
        rule, cell = self._feedback, self.feedback_cell
        if not (rule.exact or rule.corrections) and any(s.requires_grad for s in state):
            warn(
                f'the initial state requires grad under feedback "{rule}": without corrections its gradient is '
                'D[1] * delta[1], not the exact one (zero under "ft-bptt")'
            )
        count = 2 if self.bidirectional else 1
        finals: list[State] = []
        for layer, of_layer in enumerate(weights):
            each = len(of_layer) // count
            directions = [
                Direction(
                    state=tuple(s[layer * count + k] for s in state),
                    weights=tuple(of_layer[k * each : (k + 1) * each]),
                    rule=self._rules[layer * count + k],
                    learned=self.learned_state(layer * count + k, x.device),
                )
                for k in range(count)
            ]
            x, found = recurrence(cell, backend, x, layout, directions)
            finals += found
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if len(finals) == 1:
            return x, tuple(s[None] for s in finals[0])
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))


def _permute(state: State, order: Tensor | None) -> State:
    """The sequences of every part of the state in another order."""
    return state if order is None else tuple(s.index_select(1, order) for s in state)
