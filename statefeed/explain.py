"""Explanation of which kernels run a layer on a given input, why, and at what cost."""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from statefeed import native as kernels
from statefeed.backends import choose, unsupported_reasons
from statefeed.layers import RecurrentLayer

# Matrix products relative to exact BPTT, above which fewer dependent steps are not expected to pay off.
_TOO_MANY_PRODUCTS = 1.5
_REPEATS = 5


@dataclass(frozen=True)
class Explanation:
    """Result of ``explain``.

    Attributes:
        rule: the feedback rule.
        forward: the kernel of the forward pass.
        backward: the kernel of the backward pass.
        why: the reason for that choice.
        forward_flops: flops of the matrix products of the forward pass, all layers and directions.
        backward_flops: flops of the matrix products of the backward pass.
        bptt_flops: flops of the matrix products of torch.nn's backward pass.
        backward_steps: sequentially dependent products of the backward pass; T * L for exact BPTT.
        kept_bytes: memory saved for the backward pass, including outputs, in bytes; None if torch.nn's own path runs.
        warning: why the rule is expected, or with ``timed`` was measured, to be slower than exact BPTT; else None.
        seconds: time of a forward and backward pass under the rule; None unless ``timed``.
        torch_seconds: time of a forward and backward pass of torch.nn's own layer; None unless ``timed``.
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
    warning: str | None = None
    seconds: float | None = None
    torch_seconds: float | None = None

    def __str__(self) -> str:
        lines = [
            f"rule      {self.rule}",
            f"forward   {self.forward}: {self.forward_flops / 1e9:.3g} Gflop",
            f"backward  {self.backward}: {self.backward_flops / 1e9:.3g} Gflop, {self.backward_steps} dependent "
            f"products (exact BPTT: {self.bptt_flops / 1e9:.3g} Gflop)",
            f"why       {self.why}",
        ]
        if self.kept_bytes is not None:
            lines.append(f"memory    {self.kept_bytes / 2**20:.3g} MiB saved for the backward pass")
        if self.seconds is not None and self.torch_seconds is not None:
            ours, torchs = 1e3 * self.seconds, 1e3 * self.torch_seconds
            lines.append(f"time      {ours:.3g} ms forward and backward, torch.nn {torchs:.3g} ms")
        if self.warning is not None:
            lines.append(f"warning   {self.warning}")
        return "\n".join(lines)


def explain(layer: RecurrentLayer, x: Tensor | PackedSequence, timed: bool = False) -> Explanation:
    """Explain which kernels run a layer on an input, why, and at what cost.

    The cost is counted in matrix products and in sequentially dependent products. A warning is given if a rule has as
    many dependent products as exact BPTT, or more than 1.5 times its matrix products. The actual time also depends on
    the machine and the shape; ``timed`` measures it.

    Args:
        layer: a statefeed layer.
        x: an input of the layer. The current autocast state is taken into account.
        timed: run copies of the layer on x, forward and backward including the gradient of x, alternately under its
            rule and through torch.nn's own path, and report the medians of 5 runs. By default nothing is computed.

    Returns:
        ``Explanation``, which prints one fact per line.

    Gradient: none.

    Raises:
        TypeError: not a statefeed layer.
        ValueError: x has no steps or rows, or not ``input_size`` features.

    Cost: none, except building the kernels at their first use; with ``timed``, six passes of each layer.

    Example:
        >>> import torch
        >>> import statefeed as sf
        >>> print(explain(sf.GRU(4, 8, feedback="gate+1"), torch.zeros(5, 2, 4)).rule)
        gate+1
        >>> print(explain(sf.GRU(4, 8, feedback="dsf"), torch.zeros(1, 2, 4)).warning)
        1 dependent product over T = 1 steps, no fewer than exact BPTT
    """
    if not isinstance(layer, RecurrentLayer):
        kind = type(layer)
        raise TypeError(f"explain takes a statefeed RNN, GRU or LSTM, got {kind.__module__}.{kind.__qualname__}")
    data = x.data if isinstance(x, PackedSequence) else x
    if not data.numel() or data.shape[-1] != layer.input_size:
        raise ValueError(
            f"x must have at least one step and row and {layer.input_size} features, the layer's input_size, got "
            f"{tuple(data.shape)}"
        )
    rows = data.numel() // data.shape[-1]
    if isinstance(x, PackedSequence):
        T = len(x.batch_sizes)
    else:
        T = data.shape[1 if layer.batch_first and data.dim() == 3 else 0]
    cell = layer.feedback_cell
    H, G, directions = layer.hidden_size, cell.gates, 2 if layer.bidirectional else 1
    hidden = 2 * rows * H * G * H * directions * layer.num_layers
    widths = [layer.input_size, *[H * directions] * (layer.num_layers - 1)]
    inputs = sum(2 * rows * width * G * H * directions for width in widths)

    rule = layer.feedback
    bptt = 2 * inputs + 2 * hidden
    tensors = (data, *layer.parameters())
    backend = choose(cell, tensors, rule.exact).name
    reason = _reason(layer, tensors) if backend == "reference" else None
    if rule.through_torch:
        reason = '"torch" selects torch\'s own layer'
    if rule.exact and reason is not None:
        path = "torch.nn's own path"
        result = Explanation(str(rule), path, path, reason, inputs + hidden, bptt, bptt, T * layer.num_layers, None)
        return _timed(result, layer, x) if timed else result
    saved_values = rows * H * directions * layer.num_layers + sum(rows * width for width in widths)
    backward = 2 * inputs + hidden + (rule.corrections + rule.exact) * hidden
    dependent = T if rule.exact else 1 + rule.corrections
    if reason is None and data.is_cuda:
        forward = "torch's layer without autograd, through cuDNN"
        back = f"fused kernels ({kernels.described('cuda')}), which recompute the gates"
        backward += (inputs + hidden) if G > 1 else 0
        why = f"all tensors are {data.dtype} on the GPU; float32 products run with {_precision()}"
    elif reason is None:
        forward = back = f"fused kernels ({kernels.described()})"
        saved_values += rows * H * cell.saved_values * directions * layer.num_layers
        why = f"all tensors are {data.dtype} on the {data.device.type}" + (
            ", products in bfloat16 under autocast" if torch.is_autocast_enabled(data.device.type) else ""
        )
    else:
        forward = "torch's layer without autograd"
        back = "one scan and products over all steps, in PyTorch"
        backward += (inputs + hidden) if G > 1 else 0
        why = reason
    warning = (
        None if rule.exact else _expected_slower(T, dependent, (inputs + hidden + backward) / (inputs + hidden + bptt))
    )
    result = Explanation(
        str(rule), forward, back, why, inputs + hidden, backward, bptt, dependent * layer.num_layers,
        saved_values * data.element_size(), warning,
    )  # fmt: skip
    return _timed(result, layer, x) if timed else result


def _reason(layer: RecurrentLayer, tensors: tuple[Tensor, ...]) -> str:
    """Why the kernels of the input's device do not support a layer."""
    reasons = unsupported_reasons(layer.feedback_cell, tensors, layer.feedback.exact)
    return reasons["triton" if tensors[0].is_cuda else "cpu"]


def _expected_slower(T: int, dependent: int, products: float) -> str | None:
    """Why the counts predict that a rule is slower than exact BPTT; None if they do not."""
    if dependent >= T:
        products_text = "1 dependent product" if dependent == 1 else f"{dependent} dependent products"
        return f"{products_text} over T = {T} steps, no fewer than exact BPTT"
    if products > _TOO_MANY_PRODUCTS:
        return f"the products are {products:.1f} times those of exact BPTT; timed=True measures whether they are faster"
    return None


def _timed(result: Explanation, layer: RecurrentLayer, x: Tensor | PackedSequence) -> Explanation:
    ours, exact = copy.deepcopy(layer), copy.deepcopy(layer)
    seconds: dict[str, list[float]] = {"ours": [], "exact": []}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for module in (ours, exact) if layer.feedback.exact else (exact,):
            rule = module.feedback
            stack.enter_context(module.exact_rule())
            if module is ours:
                module.feedback = rule
        for repeat in range(1 + _REPEATS):
            for name, module in (("ours", ours), ("exact", exact)):
                took = _seconds(module, x)
                if repeat:
                    seconds[name].append(took)
    ours_median, torchs = (statistics.median(values) for values in seconds.values())
    slower = f"slower than exact BPTT here, {ours_median / torchs:.2f} times its time"
    return replace(result, seconds=ours_median, torch_seconds=torchs, warning=slower if ours_median > torchs else None)


def _seconds(layer: RecurrentLayer, x: Tensor | PackedSequence) -> float:
    """Time of one forward and backward pass."""
    leaf = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
    differentiated = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    start = _clock(leaf)
    with torch.enable_grad():
        y, _ = layer(x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf)
        total = (y.data if isinstance(y, PackedSequence) else y).sum()
    torch.autograd.grad(total, differentiated)
    return _clock(leaf) - start


def _clock(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _precision() -> str:
    """The float32 precision that torch is set to; it is only read."""
    rnn = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    settings = {"cuDNN": rnn, "other products": torch.backends.cuda.matmul.fp32_precision}
    return ", ".join(f"{'TF32' if set_to == 'tf32' else 'float32'} in {where}" for where, set_to in settings.items())
