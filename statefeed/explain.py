"""Which kernel runs a layer forward and backward on a given input, why, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from statefeed import kernels
from statefeed.modules import GRU, LSTM, RNN
from statefeed.recurrence import why_not_fused

_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}
# Numbers a row that the fused forward pass keeps besides its outputs, in units of H.
_TAPE = {"RNN_TANH": 0, "RNN_RELU": 0, "GRU": 4, "LSTM": 5}


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found.

    Attributes:
        rule: the feedback rule.
        forward: what runs the forward pass.
        backward: what runs the backward pass.
        why: the reason for that choice.
        forward_flops: of the matrix products of all layers and directions.
        backward_flops: likewise; those of exact BPTT are in ``bptt_flops``.
        bptt_flops: matrix products of torch.nn's backward pass.
        backward_steps: products that must wait for one another in the backward pass; T * L for exact BPTT.
        kept_bytes: what is kept from the forward to the backward pass, outputs included; None where torch.nn's own
            path decides.
    """

    rule: str
    forward: str
    backward: str
    why: str
    forward_flops: int
    backward_flops: int
    bptt_flops: int
    backward_steps: int
    kept_bytes: int | None

    def __str__(self) -> str:
        lines = [
            f"rule      {self.rule}",
            f"forward   {self.forward}: {self.forward_flops / 1e9:.3g} Gflop",
            f"backward  {self.backward}: {self.backward_flops / 1e9:.3g} Gflop, {self.backward_steps} in a row "
            f"(exact BPTT: {self.bptt_flops / 1e9:.3g} Gflop)",
            f"why       {self.why}",
        ]
        if self.kept_bytes is not None:
            lines.append(f"memory    {self.kept_bytes / 2**20:.3g} MiB kept for the backward pass")
        return "\n".join(lines)


def explain(layer: RNN | GRU | LSTM, x: Tensor | PackedSequence) -> Explanation:
    """Which kernel runs a layer on an input, why, and what it costs.

    Args:
        layer: a statefeed layer.
        x: an input of it, as its call takes it; nothing is computed with it. Autocast counts as it is at this call.

    Returns:
        ``Explanation``; printing it gives a line a fact.

    Gradient: none.

    Raises:
        TypeError: another kind of layer.

    Cost: none, but for building the kernels at their first use.

    Example:
        >>> print(explain(GRU(4, 8, feedback="gate+1"), torch.zeros(5, 2, 4)).rule)
        gate+1
    """
    if not isinstance(layer, (RNN, GRU, LSTM)):
        raise TypeError(f"explain takes a statefeed RNN, GRU or LSTM, got {type(layer).__name__}")
    data = x.data if isinstance(x, PackedSequence) else x
    rows = data.numel() // data.shape[-1]
    if isinstance(x, PackedSequence):
        T = len(x.batch_sizes)
    else:
        T = data.shape[1 if layer.batch_first and data.dim() == 3 else 0]
    H, G, directions = layer.hidden_size, _GATES[layer.mode], 2 if layer.bidirectional else 1
    hidden = 2 * rows * H * G * H * directions * layer.num_layers
    widths = [layer.input_size, *[H * directions] * (layer.num_layers - 1)]
    inputs = sum(2 * rows * width * G * H * directions for width in widths)

    rule = layer.feedback
    bptt = 2 * inputs + 2 * hidden
    reason = (
        '"bptt" means torch\'s own autograd' if rule.diagonal == "bptt" else why_not_fused(data, *layer.parameters())
    )
    if rule.exact and reason is not None:
        path = "torch.nn's own path"
        return Explanation(
            str(rule), path, path, reason, inputs + hidden, bptt, bptt, T * layer.num_layers, None
        )  # fmt: skip
    kept = rows * H * directions * layer.num_layers + sum(rows * width for width in widths)
    backward = 2 * inputs + hidden + (rule.corrections + rule.exact) * hidden
    waiting = T if rule.exact else 1 + rule.corrections
    if reason is None:
        forward = back = f"fused kernels ({kernels.described()})"
        kept += rows * H * _TAPE[layer.mode] * directions * layer.num_layers
        why = f"everything is {data.dtype} on the {data.device.type}" + (
            ", products rounded to bfloat16 under autocast" if torch.is_autocast_enabled(data.device.type) else ""
        )
    else:
        forward = "torch's layer without autograd"
        back = "one scan and products over all steps, in PyTorch"
        backward += (inputs + hidden) if G > 1 else 0
        why = reason
    return Explanation(
        str(rule), forward, back, why, inputs + hidden, backward, bptt, waiting * layer.num_layers,
        kept * data.element_size(),
    )  # fmt: skip
