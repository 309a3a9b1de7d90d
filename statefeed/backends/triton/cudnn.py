"""Forward pass of one layer with all directions in one cuDNN call, and the memory layout of its weights.

cuDNN reads the weights of a layer from one buffer: W_ih, W_hh and, with a projection, W_hr of every direction, then
b_ih and b_hh of every direction. torch copies weights in another layout into such a buffer at every call, with a
warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from statefeed.backends.protocol import Weights

# cudnnRNNMode_t; torch's own table exists only in builds with cuDNN.
_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}


def layer(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    directions: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs and final states of all directions of one layer; one node in a compiled graph for any T.

    Args:
        cell: ``"gru"``, ``"lstm"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        x: (T, B, I), or packed rows (N, I) with ``batch_sizes``.
        batch_sizes: rows of every step, int64 on the CPU, as in PackedSequence; None if x is dense.
        state: h, for an LSTM h and c, each (directions, B, H).
        weights: in the order of ``Problem.weights``, of the first direction, then of the second.
        directions: 1 or 2.
        dtype: dtype to which x and states are cast, as autocast does, and weights that do not have it (float64 is not
            cast); None for no cast.

    Returns:
        y, (T, B, directions * H) or (N, directions * H), both directions in the order of x; the final states, shaped
        as ``state``.

    Gradient: none; the backward pass of a rule computes it.

    Raises:
        ValueError: x does not have the dtype of the weights and ``dtype`` is None.

    Cost: one call of cuDNN, without its reserve space; one copy of the weights if they are in another layout.
    """
    if dtype is None and x.dtype != weights[0].dtype:
        raise ValueError(f"x must have the dtype of the weights, {weights[0].dtype}, got {x.dtype}: cast one of them")
    if dtype is not None and weights[0].dtype != torch.float64:
        x, state = x.to(dtype), [s.to(dtype) for s in state]
    y, *final = torch.ops.statefeed.cudnn_layer(cell, x, batch_sizes, state, weights, directions)
    return y, tuple(final[: len(state)])


def cast_weights(weights: Sequence[Tensor], directions: int, dtype: torch.dtype | None) -> Sequence[Tensor]:
    """The weights of a layer in the dtype of autocast; one copy of their buffer if they are in cuDNN's layout.

    Args:
        weights: as for ``layer``.
        directions: 1 or 2.
        dtype: None for no cast; float64 is not cast.
    """
    first = weights[0]
    if dtype is None or first.dtype in (dtype, torch.float64):
        return weights
    if torch.compiler.is_compiling() or not (uses_cudnn(first) and in_one_buffer(weights, directions)):
        return [w.to(dtype) for w in weights]
    buffer = first.as_strided((_buffer_size(weights, directions),), (1,), 0).to(dtype)
    start = first.data_ptr()
    return [buffer.as_strided(w.shape, w.stride(), (w.data_ptr() - start) // first.element_size()) for w in weights]


def flatten(cell: str, weights: Sequence[Tensor], directions: int = 1) -> None:
    """Move the weights of one layer into one buffer in cuDNN's layout; values and parameter objects stay.

    Call it after the weights are created or replaced. It has no effect if they are already in that layout, if two of
    them share memory, if one is not contiguous, or if cuDNN is not used.

    Args:
        cell: as for ``layer``.
        weights: as for ``layer``; parameters, changed in place.
        directions: 1 or 2.
    """
    if not uses_cudnn(weights[0]) or in_one_buffer(weights, directions):
        return
    separate = len({w.data_ptr() for w in weights}) == len(weights) and len({(w.dtype, w.device) for w in weights}) == 1
    if separate and all(w.is_contiguous() for w in weights):
        _flatten(cell, list(weights), directions)


def in_one_buffer(weights: Sequence[Tensor], directions: int) -> bool:
    """Whether the weights fill one buffer from its beginning in cuDNN's layout."""
    first = weights[0]
    at, itemsize = first.data_ptr(), first.element_size()
    if first.storage_offset() or first.untyped_storage().nbytes() < _buffer_size(weights, directions) * itemsize:
        return False
    for w in _cudnn_order(weights, directions):
        if w.data_ptr() != at or w.dtype != first.dtype or not w.is_contiguous():
            return False
        at += w.numel() * itemsize
    return True


def _buffer_size(weights: Sequence[Tensor], directions: int) -> int:
    """Elements of cuDNN's buffer, which holds biases even if there are none."""
    per = len(weights) // directions
    return sum(w.numel() for w in weights) + (0 if _biased(weights, directions) else 2 * sum(map(len, weights[::per])))


def _cudnn_order(weights: Sequence[Tensor], directions: int) -> list[Tensor]:
    per = len(weights) // directions
    each = [Weights.of(weights[d * per : (d + 1) * per]) for d in range(directions)]
    matrices = [w for named in each for w in (named.w_ih, named.w_hh, named.w_hr) if w is not None]
    return matrices + [b for named in each for b in (named.b_ih, named.b_hh) if b is not None]


def _biased(weights: Sequence[Tensor], directions: int) -> bool:
    return Weights.of(weights[: len(weights) // directions]).b_ih is not None


def uses_cudnn(weight: Tensor) -> bool:
    """Whether torch runs a layer with this weight through cuDNN."""
    return weight.is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()


def _flatten(cell: str, weights: list[Tensor], directions: int) -> None:
    per = len(weights) // directions
    projection = Weights.of(weights[:per]).w_hr
    P, H = (0, weights[1].shape[1]) if projection is None else projection.shape
    with torch.no_grad(), _on_device(weights[0]):
        torch._cudnn_rnn_flatten_weight(
            weights, per, weights[0].shape[1], _MODES[cell], H, P, 1, False, directions == 2
        )  # fmt: skip


def _packed(cell: str, weights: Sequence[Tensor], directions: int, dtype: torch.dtype) -> list[Tensor]:
    """The weights in one buffer for this call: FSDP's unsharded views, weights after ``.to``, or under autocast."""
    # Not detach(): its result must keep its storage, and a view would share the parameter's version counter.
    copies = [
        w.new_empty(0).set_(w) if w.dtype == dtype and w.is_contiguous() else w.to(dtype).contiguous()  # type: ignore[call-overload]
        for w in weights
    ]
    _flatten(cell, copies, directions)
    return copies


def _call(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    directions: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    run, biased, bidirectional = getattr(torch._VF, cell), _biased(weights, directions), directions == 2
    hx: Any = [s.contiguous() for s in state] if len(state) > 1 else state[0].contiguous()
    if batch_sizes is None:
        y, *final = run(x, hx, weights, biased, 1, 0.0, False, bidirectional, False)
    else:
        y, *final = run(x, batch_sizes, hx, weights, biased, 1, 0.0, False, bidirectional)
    return y, tuple(final)


def _on_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# The operator ---------------------------------------------------------------------------------------------------------


def run_layer(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    directions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implementation of the operator: y, h and c (empty if there is no c); arguments as for ``layer``."""
    if uses_cudnn(weights[0]):
        if weights[0].dtype != x.dtype or not in_one_buffer(weights, directions):
            weights = _packed(cell, weights, directions, x.dtype)
    elif weights[0].dtype != x.dtype:
        weights = [w.to(x.dtype) for w in weights]
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext(), torch.no_grad():
        y, final = _call(cell, x, batch_sizes, state, weights, directions)
    return y, final[0], final[1] if len(final) > 1 else x.new_empty(0)


_LIBRARY = torch.library.Library("statefeed", "FRAGMENT")
_LIBRARY.define(
    "cudnn_layer(str cell, Tensor x, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, int directions) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("cudnn_layer", run_layer, "CompositeExplicitAutograd")


@torch.library.register_fake("statefeed::cudnn_layer", lib=_LIBRARY)
def _cudnn_layer_fake(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    directions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    final = [s.new_empty(s.shape) for s in state]
    return (
        x.new_empty((*x.shape[:-1], directions * state[0].shape[-1])),
        final[0],
        final[1] if len(final) > 1 else x.new_empty(0),
    )
