"""Stage "parity": every cell, rule and dtype, dense and packed, against the equations in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import statefeed as sf
from statefeed.bench.gpu import truth
from statefeed.bench.gpu.stage import Options
from statefeed.bench.measure import ParityError, Setting, applied
from statefeed.bench.precision import flags

# Class and options, for H units, of cells without a layer of the same name.
SPECIAL: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
    "rnn_tanh": lambda H: ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": lambda H: ("RNN", {"nonlinearity": "relu"}),
    "lstm_proj": lambda H: ("LSTM", {"proj_size": 2 * H // 3}),
    "slstm": lambda H: ("SLSTM", {"num_heads": 3}),
    "slstm_exp": lambda H: ("SLSTM", {"forget_gate": "exponential"}),
}
CELLS = ("lstm_proj", "slstm", "slstm_exp", "rnn_tanh", "rnn_relu", "gru", "lstm")
RULES = ("bptt", "dsf", "gate", "gate+1", "jacobian+1", "calibrated")
# Allowed errors of outputs and gradients relative to the largest value. A wrong sign, step or factor gives more.
# For ReLU both are norms, with twice the allowed error in bfloat16: its derivative jumps at 0, so that rounding moves
# single gradients by any amount.
ALLOWED = {
    "float64": (1e-10, 1e-9),
    "float32": (2e-5, 2e-4),
    "tf32": (1e-2, 3e-2),
    "bfloat16": (4e-2, 1e-1),
    "float16": (1e-2, 3e-2),
}
DTYPES = {"cpu": ("float64", "float32", "bfloat16"), "cuda": tuple(ALLOWED)}


class Case(NamedTuple):
    """One comparison.

    Attributes:
        cell: rnn_tanh, rnn_relu, gru, lstm, lstm_proj (``proj_size`` 2H / 3), slstm (3 heads) or slstm_exp (one head,
            exponential forget gate).
        rule: rule of the backward pass.
        dtype: dtype; bfloat16 and float16 run under autocast.
        packed: sequences of different lengths, as a PackedSequence.
        T: steps of the longest sequence.
        B: sequences.
        H: hidden units; the input has H + 1 features.
        layers: L.
        bidirectional: whether the layer has both directions.
    """

    cell: str
    rule: str
    dtype: str
    packed: bool
    T: int = 37
    B: int = 5
    H: int = 33
    layers: int = 1
    bidirectional: bool = False

    @property
    def outputs(self) -> int:
        """Width of h: P with a projection, else H."""
        return 2 * self.H // 3 if self.cell == "lstm_proj" else self.H

    @property
    def state(self) -> int:
        """S, the width of the whole state."""
        others = 1 if self.cell.startswith("lstm") else 3 if self.cell.startswith("slstm") else 0
        return self.outputs + others * self.H

    def layer(self, package: Any) -> Any:
        """The layer in float64 on the CPU, of torch.nn or statefeed, always with the same weights."""
        torch.manual_seed(0)
        name, special = SPECIAL[self.cell](self.H) if self.cell in SPECIAL else (self.cell.upper(), {})
        layer = getattr(package, name)(
            self.H + 1, self.H, self.layers, bidirectional=self.bidirectional, dtype=torch.float64, **special
        )
        if name == "SLSTM":  # its own initial W_hh is zero
            for weight in layer.parameters():
                nn.init.uniform_(weight, -(self.H**-0.5), self.H**-0.5)
        return layer


def cases(device: str, smoke: bool = False) -> list[Case]:
    """Every cell, rule and dtype, dense and packed; two layers in both directions, and long sequences; cell by cell."""

    def size(cell: str) -> dict[str, Any]:
        return {"T": 7, "B": 3, "H": 6 if cell in ("lstm_proj", "slstm") else 5} if smoke else {}

    found = [
        Case(cell, rule, dtype, packed, **size(cell))
        for dtype in DTYPES[device]
        for cell in CELLS
        for rule in RULES
        for packed in (False, True)
        if not (rule.startswith("gate") and cell.startswith("rnn")) and not (rule == "calibrated" and packed)
    ]
    found += [
        Case(cell, "dsf", "float32", packed, layers=2, bidirectional=True, **size(cell))
        for cell in CELLS
        for packed in (False, True)
    ]
    if not smoke:  # several chunks of time
        found += [
            Case(cell, rule, "float32", False, T=600, B=2)
            for cell in ("lstm_proj", "slstm", "gru", "lstm")
            for rule in ("dsf", "gate")
        ]
    return sorted(found, key=lambda case: CELLS.index(case.cell))


def check(case: Case, device: str) -> dict[str, float]:
    """Compare outputs, final states and all gradients of a layer with the float64 reference.

    Args:
        case: the comparison.
        device: where the layer runs.

    Returns:
        The largest error of ``"output"`` and of ``"gradient"``, relative to the largest value (ReLU: to the norm).

    Raises:
        ParityError: an error is above the allowed one.
    """
    layer = case.layer(sf)
    expected = _expected(case, layer)
    layer.feedback = case.rule
    return compare(case, results_on_device(case, layer, device), expected)


def compare(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest errors; raises ParityError if one is above the allowed error."""
    errors = {"output": 0.0, "gradient": 0.0}
    for name, value in expected.items():
        kind = "output" if name in ("y", "final") else "gradient"
        order, size = (2, "norm") if case.cell == "rnn_relu" else (torch.inf, "largest value")
        error = float(torch.linalg.vector_norm(found[name] - value, order) / torch.linalg.vector_norm(value, order))
        allowed = ALLOWED[case.dtype][kind == "gradient"]
        if (case.cell, case.dtype) == ("rnn_relu", "bfloat16"):
            allowed *= 2
        if not error <= allowed:
            raise ParityError(f"{name} must agree with float64 within {allowed:.0e} of its {size}, got {error:.1e}")
        errors[kind] = max(errors[kind], error)
    return errors


def _data(case: Case) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Sequences (T_b, I), the gradients of their outputs and of the final states (L * directions, B, S)."""
    generator = torch.Generator().manual_seed(1)
    directions = 2 if case.bidirectional else 1
    lengths = [max(1, case.T - 3 * b * case.packed) for b in range(case.B)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    x = [normal(n, case.H + 1) for n in lengths]
    grads = [normal(n, case.outputs * directions) for n in lengths]
    return x, grads, normal(case.layers * directions, case.B, case.state)


def _expected(case: Case, layer: nn.Module) -> dict[str, Tensor]:
    """The reference: dense sequences as one batch, sequences of different lengths one by one."""
    sequences, grads, final_grad = _data(case)
    groups = [[b] for b in range(case.B)] if case.packed else [list(range(case.B))]
    y, final = [], []
    loss = torch.zeros((), dtype=torch.float64, device="cpu")
    x = [sequence.requires_grad_() for sequence in sequences]
    for group in groups:
        outputs, states = truth.outputs(layer, case.rule, torch.stack([x[b] for b in group], 1))
        loss = loss + (outputs * torch.stack([grads[b] for b in group], 1)).sum()
        loss = loss + (states * final_grad[:, group]).sum()
        y += list(outputs.detach().unbind(1))
        final.append(states.detach())
    found = torch.autograd.grad(loss, [*x, *layer.parameters()])
    named = dict(zip((name for name, _ in layer.named_parameters()), found[len(x) :], strict=True))
    return {"y": torch.cat(y), "final": torch.cat(final, 1), "x": torch.cat(found[: len(x)]), **named}


def results_on_device(case: Case, layer: nn.Module, device: str) -> dict[str, Tensor]:
    """The results of the layer on the device, converted to float64 on the CPU."""
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(case.dtype)
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    layer = copy.deepcopy(layer).to(device, dtype)
    sequences, grads, final_grad = _data(case)
    x = [sequence.to(device, dtype).requires_grad_() for sequence in sequences]
    given: Any = pack_sequence(x) if case.packed else torch.stack(x, 1)
    with torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
        outputs, states = layer(given)
    y = _sequences(outputs)
    final = torch.cat(states, -1) if isinstance(states, tuple) else states
    loss = (final.double() * final_grad.to(device)).sum()
    for output, grad in zip(y, grads, strict=True):
        loss = loss + (output.double() * grad.to(device)).sum()
    found = [value.double().cpu() for value in torch.autograd.grad(loss, [*x, *layer.parameters()])]
    named = dict(zip((name for name, _ in layer.named_parameters()), found[len(x) :], strict=True))
    ends = {"y": torch.cat(y).detach().double().cpu(), "final": final.detach().double().cpu()}
    return {**ends, "x": torch.cat(found[: len(x)]), **named}


def _sequences(outputs: Tensor | PackedSequence) -> list[Tensor]:
    if isinstance(outputs, PackedSequence):
        padded, lengths = nn.utils.rnn.pad_packed_sequence(outputs)
        return [padded[:n, b] for b, n in enumerate(lengths.tolist())]
    return list(outputs.unbind(1))


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Check every case; failures are recorded, and the other cases still run.

    Yields:
        One record per case, with ``errors``, or ``failed`` or ``not_run``.
    """
    for case in cases(options.device, options.smoke):
        record: dict[str, Any] = case._asdict()
        if options.time_left() <= 0:
            yield {**record, "not_run": "no time left"}
            continue
        setting = Setting(case.dtype, tf32=case.dtype == "tf32") if options.device == "cuda" else Setting("as shipped")
        try:
            with applied(setting):
                found = {"errors": check(case, options.device), "tf32": flags()}
            yield {**record, **found}
        except Exception as error:  # the other cases still run
            yield {**record, "failed": f"{type(error).__name__}: {error}"}
