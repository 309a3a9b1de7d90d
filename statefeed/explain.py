"""Report of which kernels run a layer on a given input, why, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from statefeed.backends import BACKENDS, Backend, choose, unsupported_reasons
from statefeed.backends.protocol import Description
from statefeed.busy import describe
from statefeed.cells.protocol import Cell
from statefeed.counts import Counts, counts_of, saved_bytes
from statefeed.stack import RecurrentStack
from statefeed.timing import Timing, time_rules

# Matrix products relative to exact BPTT above which a rule is not expected to be faster.
_TOO_MANY_PRODUCTS = 1.5
_BPTT_IN_TORCH = (
    '"bptt" takes torch\'s own path on this input, because kernels are slower there, and an approximate rule runs '
    "kernels; timed=True measures whether it is slower"
)
_TORCHS_PATH = "torch.nn's own path"


@dataclass(frozen=True)
class Explanation:
    """Result of ``explain``.

    Attributes:
        rule: the feedback rule.
        forward: the kernels of the forward pass.
        backward: the kernels of the backward pass.
        why: the reason for this choice.
        forward_flops: flops of the matrix products of the forward pass, all layers and directions.
        backward_flops: flops of the matrix products of the backward pass.
        bptt_flops: flops of the matrix products of torch.nn's backward pass.
        backward_steps: sequentially dependent products of the backward pass; T * L for exact BPTT.
        kept_bytes: bytes saved for the backward pass, including outputs, but not initial states and masks of dropout; 0
            without autograd, or if neither the layer nor the input requires a gradient; None if torch.nn's own path
            runs.
        warning: why the rule is expected, or with ``timed`` was measured, to be slower than exact BPTT, or why the
            times allow no conclusion; else None.
        seconds: time of a forward and backward pass under the rule; None unless ``timed``.
        torch_seconds: time of a forward and backward pass of torch.nn's own layer; None unless ``timed``, and None for
            a cell that torch lacks.
        timings: of the rule, of ``"bptt"``, of ``"dsf"`` and of torch.nn's own layer, each with ``rule``, ``seconds``
            and ``times_faster`` than the last one as (median, least, largest). Empty unless ``timed``.
        other_load: processors that other processes used meanwhile; None unless ``timed``, and where the system does not
            say.
        iterations: iterations of ``forward_method`` "newton" in the last call of the layer, per layer and direction;
            empty before the first call, and for a sequential forward pass.
        sequential_steps: number of steps of that call that did not converge and ran sequentially, in the same form.
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
    timings: tuple[Timing, ...] = ()
    other_load: float | None = None
    iterations: tuple[int, ...] = ()
    sequential_steps: tuple[int, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"rule      {self.rule}",
            f"forward   {self.forward}: {self.forward_flops / 1e9:.3g} Gflop",
            f"backward  {self.backward}: {self.backward_flops / 1e9:.3g} Gflop, {self.backward_steps} dependent "
            f"products (exact BPTT: {self.bptt_flops / 1e9:.3g} Gflop)",
            f"why       {self.why}",
        ]
        if self.iterations:
            taken = ", ".join(map(str, self.iterations))
            lines.append(
                f"newton    {taken} iterations in the last call, {sum(self.sequential_steps)} sequential steps"
            )
        if self.kept_bytes is not None:
            saved = f"{self.kept_bytes / 2**20:.3g} MiB" if self.kept_bytes else "nothing"
            lines.append(f"memory    {saved} saved for the backward pass")
        if self.timings:
            times = ", ".join(f"{_name(timing)} {1e3 * timing.seconds:.3g} ms" for timing in self.timings)
            lines.append(f"time      {times}; forward and backward, medians of runs in turns")
            ratios = (f"{_name(timing)} {_ratio(timing)}" for timing in self.timings[:-1])
            baseline = _name(self.timings[-1])
            lines.append(f"ratio     times faster than {baseline}, median (range) over the turns: {', '.join(ratios)}")
            if self.warning is None or describe(self.other_load).partition(";")[0] not in self.warning:
                lines.append(f"machine   {describe(self.other_load)}")
        if self.warning is not None:
            lines.append(f"warning   {self.warning}")
        return "\n".join(lines)


def _name(timing: Timing) -> str:
    return "torch.nn" if timing.rule == "torch" else timing.rule


def _ratio(timing: Timing) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*timing.times_faster)


def explain(layer: nn.Module, x: Tensor | PackedSequence, timed: bool = False) -> Explanation:
    """Report which kernels run a layer on an input, why, and at what cost.

    The cost is counted in matrix products and in sequentially dependent products. A warning is given if a rule has as
    many dependent products as exact BPTT, or more than 1.5 times its matrix products. The actual time also depends on
    the machine and the shape; ``timed`` measures it. The forward products of ``forward_method`` "newton" are those of
    the layer's last call, and of one iteration before the first.

    Args:
        layer: a statefeed layer.
        x: an input of the layer. The current autocast state is taken into account.
        timed: run copies of the layer on x, forward and backward including the gradient of x, in turns under its rule,
            ``"bptt"``, ``"dsf"`` and through torch.nn's own path, and report the medians of 5 runs, the ratios with
            their range, and whether other processes kept the machine busy. By default nothing is computed.

    Returns:
        ``Explanation``, which prints one fact per line.

    Gradient: none.

    Raises:
        TypeError: the layer is not a statefeed layer, or x is not a tensor.
        ValueError: x has no steps or rows, or its features are not ``input_size``.

    Cost: none, except building the kernels at their first use; with ``timed``, six passes under each of the rules.

    Example:
        >>> import torch
        >>> import statefeed as sf
        >>> print(explain(sf.GRU(4, 8, feedback="gate+1"), torch.zeros(5, 2, 4)).rule)
        gate+1
        >>> print(explain(sf.GRU(4, 8, feedback="dsf"), torch.zeros(1, 2, 4)).warning)
        1 dependent product over T = 1 steps, no fewer than exact BPTT
    """
    checked = _checked(layer, x)
    data = x.data if isinstance(x, PackedSequence) else x
    rule, cell = checked.feedback, checked.feedback_cell
    weights = [weight for number in range(checked.num_layers) for weight in checked._weights_of(number)]
    backend = choose(cell, (data, *weights), rule.exact, checked.forward_method != "sequential")
    with torch.enable_grad():
        reason = checked.torch_path_reason(x)
    if reason is None and backend.fallback and checked.forward_method == "sequential":
        reason = _reason(checked, (data, *weights))
    counts = counts_of(checked, x)
    if rule.exact and reason is not None and cell.torch_forward is not None:
        result = _through_torch(checked, counts, reason)
    else:
        result = _through(backend, checked, x, counts, reason)
    return _timed(result, checked, x) if timed else result


def _checked(layer: nn.Module, x: object) -> RecurrentStack:
    if not isinstance(layer, RecurrentStack):
        kind = type(layer)
        raise TypeError(
            f"explain takes a statefeed RNN, GRU, LSTM or CellLayer, got {kind.__module__}.{kind.__qualname__}: pass "
            "one layer of the model, such as model.rnn, after sf.swap(model)"
        )
    if not isinstance(x, (Tensor, PackedSequence)):
        raise TypeError(f"x must be an input of the layer, a tensor or PackedSequence, got {type(x).__name__}")
    data = x.data if isinstance(x, PackedSequence) else x
    if not data.numel() or data.shape[-1] != layer.input_size:
        raise ValueError(
            f"x must have at least one step and row and {layer.input_size} features, the layer's input_size, got "
            f"{tuple(data.shape)}"
        )
    return layer


def _through_torch(layer: RecurrentStack, counts: Counts, reason: str) -> Explanation:
    return Explanation(
        rule=str(layer.feedback),
        forward=_TORCHS_PATH,
        backward=_TORCHS_PATH,
        why=reason,
        forward_flops=counts.forward,
        backward_flops=counts.bptt,
        bptt_flops=counts.bptt,
        backward_steps=counts.steps * layer.num_layers,
        kept_bytes=None,
    )


def _through(
    backend: Backend, layer: RecurrentStack, x: Tensor | PackedSequence, counts: Counts, reason: str | None
) -> Explanation:
    rule, method, cell = layer.feedback, layer.forward_method, layer.feedback_cell
    data = x.data if isinstance(x, PackedSequence) else x
    found = _description(backend, cell, data, rule.exact)
    passes = 1 + rule.corrections
    backward = 2 * counts.inputs + (passes + rule.exact) * counts.hidden + (1 + passes) * counts.projection
    if cell.projects and rule.diagonal.is_jacobian:
        backward += counts.hidden * (passes if found.recomputes_jacobian else 1)
    if found.recomputes_gates:
        backward += counts.inputs + counts.hidden
    dependent = counts.steps if rule.exact else passes
    forward, forward_flops, why = found.forward, counts.forward, found.why
    warning = None
    if not rule.exact:
        products = (forward_flops + backward) / (forward_flops + counts.bptt)
        warning = _expected_slower(counts.steps, dependent, products)
        if warning is None and layer.is_faster_in_torch(x):
            warning = _BPTT_IN_TORCH
    if method != "sequential":
        forward = (
            f"{method}, one product over all steps and one scan per iteration; without convergence {found.forward}"
        )
        why = f'forward_method is "{method}"'
        of_iteration = counts.hidden + counts.projection
        done = sum(layer.newton_iterations) * (of_iteration // layer._feedback_rows)
        forward_flops = counts.inputs + (done if layer.newton_iterations else of_iteration)
        warning = _slower_forward(data) or warning
    needs_grad = data.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())
    saves = needs_grad and torch.is_grad_enabled()
    return Explanation(
        rule=str(rule),
        forward=forward,
        backward=found.backward,
        why=reason or why,
        forward_flops=forward_flops,
        backward_flops=backward,
        bptt_flops=counts.bptt,
        backward_steps=dependent * layer.num_layers,
        kept_bytes=saved_bytes(layer, x, counts, backend, found) if saves else 0,
        warning=warning,
        iterations=layer.newton_iterations,
        sequential_steps=layer.newton_sequential_steps,
    )


def _reason(layer: RecurrentStack, tensors: tuple[Tensor, ...]) -> str:
    """Why the kernels of the input's device do not support a layer."""
    device = tensors[0].device.type
    reasons = unsupported_reasons(layer.feedback_cell, tensors, layer.feedback.exact)
    of_device = [reason for name, reason in reasons.items() if BACKENDS[name].device == device]
    return of_device[0] if of_device else f"there are no kernels for {device}"


def _description(backend: Backend, cell: Cell, x: Tensor, exact: bool) -> Description:
    if backend.describe is not None:
        return backend.describe(cell, x, exact)
    name = f"the backend {backend.name!r}"
    return Description(name, name, "it is the first in the table of backends that supports the layer")


def _expected_slower(T: int, dependent: int, products: float) -> str | None:
    """Why the counts predict that a rule is slower than exact BPTT; None if they do not."""
    if dependent >= T:
        products_text = "1 dependent product" if dependent == 1 else f"{dependent} dependent products"
        return f"{products_text} over T = {T} steps, no fewer than exact BPTT"
    if products > _TOO_MANY_PRODUCTS:
        return f"the products are {products:.1f} times those of exact BPTT; timed=True measures whether they are faster"
    return None


def _slower_forward(x: Tensor) -> str | None:
    """Why a forward pass in parallel over time is expected to be slower than the sequential one; None if it is not."""
    if x.is_cuda:
        return None
    return (
        'forward_method "newton" repeats the products of all steps, which pays where a device runs many steps at once; '
        f'on a {x.device.type} it is expected to be slower than "sequential"'
    )


def _timed(result: Explanation, layer: RecurrentStack, x: Tensor | PackedSequence) -> Explanation:
    timings = time_rules(layer, x)
    seconds = {timing.rule: timing.seconds for timing in timings.rules}
    return replace(
        result,
        seconds=seconds[result.rule],
        torch_seconds=seconds.get("torch"),
        timings=timings.rules,
        other_load=timings.other_load,
        # On torch.nn's own path both times are of the same kernels.
        warning=None if result.backward == _TORCHS_PATH else timings.conclusion(layer.feedback.exact),
    )
