"""Base class of RNN, GRU, LSTM and CellLayer: stacked layers and directions over every form of input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from statefeed import newton
from statefeed.backends import choose
from statefeed.cells.protocol import Cell, State
from statefeed.feedback import Feedback
from statefeed.layout import Layout, segment
from statefeed.mixin import FeedbackLayer, complex_reason
from statefeed.recurrence import NO_STEP, Direction, autocast_dtype, recurrence
from statefeed.transforms import NO_EXPANDED_WEIGHTS, is_expanded, traced
from statefeed.user_warning import warn

Path: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]  # from input and initial state to outputs and final state

# With torch 2.10 and 2.11 a compiled layer with two directions computes a wrong gradient of its input.
_COMPILES = torch.__version__ >= "2.13"
_NOT_COMPILED = (
    f"torch.compile of a recurrent layer needs torch 2.13 or later, got {torch.__version__}: leave out the "
    'layer, or set feedback to "torch"'
)


class RecurrentStack(FeedbackLayer):
    """Stacked recurrent layers in one or two directions with a feedback rule.

    Inputs, outputs and states have the forms of torch.nn.RNNBase. A subclass has the attributes and parameter names of
    torch.nn.GRU.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    _torchscript: ClassVar[str]  # message of the error that TorchScript raises

    @property
    def feedback_cell(self) -> Cell:
        raise NotImplementedError

    @property
    def _state_size(self) -> int:
        return sum(self._state_widths[: self.feedback_cell.gradient_parts])

    @property
    def _output_width(self) -> int:
        """Width of h, which is also the width of the outputs per direction."""
        return self.hidden_size

    @property
    def _state_widths(self) -> tuple[int, ...]:
        return self.feedback_cell.state_widths(self.hidden_size, self._output_width)

    @property
    def _feedback_rows(self) -> int:
        return self.num_layers * (2 if self.bidirectional else 1)

    def unsupported_forward(self, method: newton.Newton | None, rule: Feedback) -> str | None:
        if method is None:
            return None
        complex_dtype = self.complex_dtype
        if complex_dtype is not None:
            return newton.complex_reason(method, complex_dtype)
        if rule.through_torch:
            return f'forward_method "{method}" does not support feedback "torch": set feedback to "bptt"'
        return newton.unsupported_cell(self.feedback_cell)

    def _weights_of(self, layer: int) -> list[Tensor]:
        """The weights of one layer: those of the forward direction, then those of the reverse direction."""
        names = self.feedback_cell.weight_names(self.bias)
        suffixes = (f"_l{layer}", f"_l{layer}_reverse") if self.bidirectional else (f"_l{layer}",)
        return [self._weight(name + suffix) for suffix in suffixes for name in names]

    def _weight(self, name: str) -> Tensor:
        weight = self._parameters.get(name)  # as an attribute it costs a microsecond
        return getattr(self, name) if weight is None else weight  # a parametrized weight is no parameter

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, ...] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Run the layer over a batch of sequences; arguments and results are those of torch.nn's layer.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx: initial state (L * directions, B, H), or (L * directions, H) unbatched; a pair (h, c) for an LSTM, with
                h of width P under ``proj_size``; zeros if None.
            lengths: int64 (B,), number of valid steps of every row, as an alternative to packing. Outputs after the
                end of a row are zero, and its final state is the state at its last valid step.
            resets: bool (T, B), or (B, T) with batch_first; true where a new sequence begins inside a row. The state
                before that step is zero, and no gradient passes through it. The reverse direction is split at the
                same steps.

        Returns:
            Outputs (T, B, H * directions), with ``proj_size`` P in place of H, in the form of the input, and the final
            state in the form of hx.

        Gradient: exact if ``feedback`` is exact or has k >= T corrections; approximate otherwise. Without autograd
            (``torch.no_grad``) nothing is saved. In ``torch.export`` torch's own layer runs if torch has the cell.

        Raises:
            ValueError: lengths or resets of a wrong shape or dtype, or a complex input under an approximate rule.
            RuntimeError: an input or state of a wrong shape; TorchScript traces the layer with autograd enabled.
        """
        if isinstance(input, fx.Proxy):
            return traced(input, self, RecurrentStack, hx, lengths=lengths, resets=resets)
        if lengths is not None or resets is not None:
            return self._forward_segments(input, hx, lengths, resets)
        return self._forward(input, hx)

    def _forward(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        """The forward pass on a padded, packed or unbatched input.

        Segments call this method and not ``forward``, so that the ``forward`` of a subclass runs once per call.
        """
        in_torch = self._in_torch(input)
        if in_torch is not None:
            return in_torch(input, hx)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(self._torchscript)
        weights = [self._weights_of(layer) for layer in range(self.num_layers)]
        backend = self._backend(input, hx, weights)
        if self._newton is not None and (torch.compiler.is_compiling() or torch.compiler.is_exporting()):
            raise RuntimeError(newton.NOT_COMPILED)
        if backend is None:
            return self._torch_path(input, hx)
        if torch.compiler.is_compiling() and not _COMPILES:
            raise RuntimeError(_NOT_COMPILED)
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
        state = self._zeros(x, layout.B) if hx is None else permute(self._as_state(hx), sorted_indices)
        self._check(x, state, batch_sizes)
        if x.is_complex() and self._newton is not None:
            raise ValueError(newton.complex_reason(self._newton, x.dtype))
        if x.is_complex() and not self._feedback.exact:
            raise ValueError(complex_reason(self._feedback, x.dtype))

        rows = x if packed or not self.batch_first else x.transpose(0, 1)
        y, final = self._layers(backend, rows, layout, state, weights)
        if packed:
            return (
                PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices),
                self._as_hx(permute(final, unsorted_indices)),
            )
        if self.batch_first:
            y = y.transpose(0, 1)
        if unbatched:
            y = y.squeeze(0 if self.batch_first else 1)
            final = tuple(s.squeeze(1) for s in final)
        return y, self._as_hx(final)

    def _zeros(self, x: Tensor, sequences: int) -> State:
        """An initial state of zeros, in the dtype of the input."""
        rows = self._feedback_rows
        return tuple([x.new_zeros(rows, sequences, width) for width in self._state_widths])

    def _backend(self, input: Tensor | PackedSequence, hx: Any, weights: list[list[Tensor]]) -> str | None:
        """The backend that runs this call, selected once for all layers; None if torch's own layer runs it."""
        x = input.data if isinstance(input, PackedSequence) else input
        state = () if hx is None else self._as_state(hx)
        tensors = (x, *state, *(w for layer_weights in weights for w in layer_weights))
        return choose(self.feedback_cell, tensors, self._feedback.exact, self._newton is not None).name

    def _in_torch(self, input: Tensor | PackedSequence) -> Path | None:
        """What runs a call in torch, whatever the backends support; None if a backend may run it."""
        return None

    def is_faster_in_torch(self, input: Tensor | PackedSequence) -> bool:
        """Whether torch's own layer is preferred to the kernels on an input, under an exact rule."""
        return False

    def torch_path_reason(self, input: Tensor | PackedSequence) -> str | None:
        """Why torch's own layer runs a call on this input.

        Args:
            input: as for ``forward``.

        Returns:
            The reason in one sentence; None if a backend may run the call.
        """
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

        ``y[t], s[t] = step(x[t], s[t-1])``; consecutive steps give the same outputs as one call of ``forward`` on the
        whole sequence. torch.nn's layer has no ``step``: after ``statefeed.restore`` call it on sequences of length 1.

        Args:
            x: (B, I), the input of this step.
            state: (L, B, H), or a pair of them for an LSTM, as the previous call returned it; zeros if None.

        Returns:
            y (B, H), and the state to pass to the next call.

        Gradient: none; train on whole sequences.

        Raises:
            ValueError: the layer is bidirectional and so needs future steps, or x does not have two dimensions.

        Cost: one step without autograd.

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
        """Run every segment as a sequence of a packed batch, and scatter the outputs to the rows."""
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
        if not T:
            raise RuntimeError(NO_STEP)
        segments = segment(T, B, lengths, resets, x.device)
        if not B:
            return self._forward(padded, hx)
        if hx is not None:
            hx = self._as_hx(tuple(segments.initial(s, directions) for s in self._as_state(hx)))
        packed = PackedSequence(x.flatten(0, 1)[segments.gather_index], segments.batch_sizes)
        y, final = self._forward(packed, hx)
        dtypes = self._padded_dtypes(x, hx)
        rows = y.data if dtypes is None else y.data.to(dtypes[0])
        out = rows.new_zeros(T * B, rows.shape[-1]).index_copy(0, segments.gather_index, rows)
        out = out.unflatten(0, (T, B))
        ends = self._as_state(final)
        if dtypes is None:
            dtypes = (rows.dtype,) * len(ends)
        ends = tuple(segments.final(s.to(dtype), directions) for s, dtype in zip(ends, dtypes, strict=True))
        return out.transpose(0, 1) if self.batch_first else out, self._as_hx(ends)

    def _padded_dtypes(self, x: Tensor, hx: Any) -> tuple[torch.dtype, ...] | None:
        """The dtypes of a padded batch under autocast on a CPU, which must not depend on lengths; otherwise None."""
        compute_dtype = autocast_dtype(x) if x.is_cpu else None
        if compute_dtype is None or x.dtype == torch.float64:  # autocast does not cast float64
            return None
        state = x if hx is None else self._as_state(hx)[-1]
        return self.feedback_cell.autocast_dtypes(compute_dtype, state.dtype, False)

    def _batched(self, x: Tensor, hx: Any) -> tuple[Tensor, Any, bool]:
        """Input and initial state with a batch axis, and whether the axis was added."""
        if x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D instead")
        unbatched = x.dim() == 2
        if hx is None:
            return x.unsqueeze(0 if self.batch_first else 1) if unbatched else x, None, unbatched
        states = self.feedback_cell.states
        parts = len(states)
        if parts > 1 and not unbatched:
            kind = "pair" if parts == 2 else "tuple"
            expected = f"hx of {type(self).__name__} must be a {kind} ({', '.join(states)})"
            if isinstance(hx, Tensor):
                raise TypeError(f"{expected}, got one tensor of shape {tuple(hx.shape)}")
            if len(hx) != parts:
                raise RuntimeError(f"{expected}, got {len(hx)} tensors")
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
        """Run all layers over x (T, B, I) or packed rows; every part of the state is (L * directions, B, H)."""
        rule, cell = self._feedback, self.feedback_cell
        approximate = torch.is_grad_enabled() and not (rule.exact or rule.corrections)
        if approximate and any(s.requires_grad for s in state[: cell.gradient_parts]):
            warn(
                f'the initial state requires grad under feedback "{rule}": without corrections its gradient is '
                'D[1] * delta[1], not the exact one (zero under "ft-bptt")'
            )
        count = 2 if self.bidirectional else 1
        iteration = None if self._newton is None else newton.Run(self._newton, self._take_guess(x))
        shape = x.shape[:-1]
        finals: list[State] = []
        for layer, layer_weights in enumerate(weights):
            size = len(layer_weights) // count  # weights of one direction
            directions = [
                Direction(
                    state=tuple(s[layer * count + k] for s in state),
                    weights=tuple(layer_weights[k * size : (k + 1) * size]),
                    rule=self._rules[layer * count + k],
                    learned=self.learned_state(layer * count + k, x.device),
                )
                for k in range(count)
            ]
            x, layer_finals = recurrence(cell, backend, x, layout, directions, iteration)
            finals += layer_finals
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if iteration is not None:
            self.newton_iterations = tuple(iteration.iterations)
            self.newton_sequential_steps = tuple(iteration.sequential_steps)
            self.newton_states = tuple(h.detach().view(*shape, -1) for h in iteration.states)
        if len(finals) == 1:
            return x, tuple(s[None] for s in finals[0])
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))

    def _take_guess(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """The estimate given for this call, checked and removed."""
        guess, self.newton_guess = self.newton_guess, None
        if guess is not None:
            newton.check_guess(guess, (*x.shape[:-1], self._state_widths[0]), self._feedback_rows)
        return guess


def permute(state: State, order: Tensor | None) -> State:
    """Every part of the state with its sequences in the given order."""
    return state if order is None else tuple(s.index_select(1, order) for s in state)
