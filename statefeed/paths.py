"""The calls that torch's own layers run faster than the CPU kernels: a fixed table, not a timing.

The table holds, by cell and by how torch computes, ranges of shapes where torch's own layer took less time than the
kernels in `python -m statefeed.bench.paths`, in training or without autograd. Its borders were drawn for one layer and
direction with as many inputs as units on a Zen 5, and compared with the records of Zen 4 and Xeon in `results/bench`.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_ANY = sys.maxsize
_FEW = 4  # sequences


class Range(NamedTuple):
    """A range of shapes: the most steps, sequences, units, states (steps x sequences x units) and threads.

    ``few`` bounds the sequences from above, ``many`` from below; ``least`` bounds the states from below.
    """

    steps: int
    few: int = _ANY
    many: int = 1
    units: int = _ANY
    states: int = _ANY
    least: int = 0
    threads: int = _ANY


class Way(NamedTuple):
    """How torch computes a layer.

    Attributes:
        cell: rnn, gru or lstm.
        bf16: whether products run in bfloat16 under autocast, else in float32 or float64.
        packed: whether the batch is packed, for an LSTM with several lengths.
        onednn: whether one call of oneDNN runs the whole layer: an LSTM on sequences of one length, not in float64, and
            without projections.
        projected: whether the layer projects its output.
    """

    cell: str
    bf16: bool = False
    packed: bool = False
    onednn: bool = False
    projected: bool = False


# A range of few steps costs the kernels more per call than it saves per step. Their threads cost less than torch's.
_FASTER_IN_TORCH: dict[Way, tuple[Range, ...]] = {
    Way("rnn"): (Range(4, _FEW), Range(3, states=1 << 14), Range(4, states=1 << 12)),
    Way("rnn", packed=True): (Range(8, _FEW), Range(5)),
    Way("gru"): (Range(2, _FEW),),
    Way("gru", packed=True): (Range(4, _FEW), Range(3)),
    Way("lstm"): (Range(3, _FEW), Range(2)),
    Way("lstm", packed=True): (Range(4, _FEW), Range(3)),
    Way("lstm", projected=True): (Range(5, _FEW),),
    Way("lstm", packed=True, projected=True): (Range(5, _FEW),),
    # Large batches go through oneDNN's LSTM at the rate of the kernels, until its buffers leave the cache.
    Way("lstm", onednn=True): (
        Range(12, _FEW, units=128),
        Range(6, many=_FEW + 1, states=1 << 18),
        Range(48, many=_FEW + 1, states=1 << 18, threads=1),
    ),
    Way("lstm", bf16=True, onednn=True): (
        Range(100, many=_FEW + 1, states=1 << 19, least=1 << 15, threads=1),
        Range(100, many=_FEW + 1, states=1 << 19, least=1 << 18),
    ),
}
_LONGEST = max(r.steps for ranges in _FASTER_IN_TORCH.values() for r in ranges)


def is_faster_in_torch(way: Way, steps: int, sequences: int, units: int) -> bool:
    """Whether torch's own layer runs a call faster than the kernels with torch's number of threads, by the table.

    Cost: a microsecond.

    Example:
        >>> is_faster_in_torch(Way("gru"), 2, 1, 64), is_faster_in_torch(Way("gru"), 64, 16, 64)
        (True, False)
    """
    if steps > _LONGEST:
        return False
    if steps == 1:
        return True
    for most in _FASTER_IN_TORCH.get(way, ()):
        if (
            steps <= most.steps
            and most.many <= sequences <= most.few
            and units <= most.units
            and most.least <= steps * sequences * units <= most.states
            and torch.get_num_threads() <= most.threads
        ):
            return True
    return False


def is_faster_as_a_cell(x: Tensor, sequences: int) -> bool:
    """Whether torch's function of the LSTM cell runs one step faster than that of the layer, which takes oneDNN.

    Cost: less than a microsecond.
    """
    onednn = torch._C._has_mkldnn and torch._C._get_mkldnn_enabled() and x.dtype == torch.float32
    return not onednn or sequences <= _FEW or torch.is_autocast_enabled("cpu")


def reason(way: Way, steps: int, sequences: int, units: int) -> str:
    """Why torch's own layer is faster, where it is.

    Example:
        >>> reason(Way("gru"), 2, 1, 64)
        "torch's own gru is faster at 2 x 1 x 64 (steps x sequences x units): it costs less per call"
    """
    if steps == 1:
        return "one step has no recurrence to fuse, and torch's own path costs less per call"
    saves = "oneDNN runs it in one call" if way.onednn else "it costs less per call"
    in_bf16 = " in bfloat16" if way.bf16 else ""
    shape = f"{steps} x {sequences} x {units} (steps x sequences x units)"
    return f"torch's own {way.cell} is faster at {shape}{in_bf16}: {saves}"


def way_of(mode: str, input: Tensor | PackedSequence, projected: bool = False) -> Way | None:
    """How torch computes a layer on an input; None where the kernels and torch do not both run it alike.

    Args:
        mode: of torch.nn.RNNBase.
        input: of the layer.
        projected: whether the layer projects its output, which oneDNN does not support.
    """
    if isinstance(input, PackedSequence):
        x, packed = input.data, True
    else:
        x, packed = input, False
    bf16, dtype = torch.is_autocast_enabled("cpu"), x.dtype
    if not x.is_cpu or (bf16 and torch.get_autocast_dtype("cpu") != torch.bfloat16):
        return None
    if not bf16 and dtype not in (torch.float32, torch.float64):
        return None
    if mode != "LSTM":
        return Way("gru" if mode == "GRU" else "rnn", bf16, packed)
    if projected:
        return Way("lstm", bf16, packed, projected=True)
    if lacks_bf16(input):
        return None  # torch's layer then runs in float32
    ragged = isinstance(input, PackedSequence) and not _same_lengths(input)
    onednn = not ragged and (bf16 or dtype == torch.float32)
    return Way("lstm", bf16, ragged, onednn and torch._C._has_mkldnn and torch._C._get_mkldnn_enabled())


def extent(input: Tensor | PackedSequence, batch_first: bool) -> tuple[int, int]:
    """Number of steps and of sequences of an input."""
    if isinstance(input, PackedSequence):
        steps = input.batch_sizes.shape[0]
        return steps, int(input.batch_sizes[0].item()) if steps else 0
    if input.dim() != 3:
        return input.shape[0] if input.dim() else 0, 1
    first, second, _ = input.shape
    return (second, first) if batch_first else (first, second)


def lacks_bf16(input: Tensor | PackedSequence) -> bool:
    """Whether oneDNN, which runs torch's LSTM unless lengths differ, raises under the enabled bfloat16 autocast."""
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    x = input if isinstance(input, Tensor) else input.data
    return x.is_cpu and not onednn_supports_bf16() and (isinstance(input, Tensor) or _same_lengths(input))


def _same_lengths(input: PackedSequence) -> bool:
    """Whether no sequence ends before the last step; by the number of rows, which costs less than a comparison."""
    sizes = input.batch_sizes
    return input.data.shape[0] == sizes.shape[0] * sizes[0].item()


@functools.cache
def onednn_supports_bf16() -> bool:
    """Whether oneDNN can run bfloat16 layers on this CPU, or is not used at all."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not available or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# As for ``native.unavailable``: a constant to torch.compile.
onednn_supports_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]
