"""Parity of the contenders with float64, checked before anything is timed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import statefeed as sf
from statefeed.bench.case import Case, Contender, Input
from statefeed.bench.measure import SHIPPED, ParityError, applied
from statefeed.bench.published import published

_PARITY_STEPS = 16
# A rule with k = T - 1 corrections is exact in x and the parameters (the initial state needs one more), but only by
# cancellation of terms that grow like binom(T, k), so few steps are used.
_CORRECTED_STEPS = 3
# Allowed errors relative to the largest value: some hundred roundings; a wrong sign or step gives 0.1 or more.
_ALLOWED = {
    "float64": {"output": 1e-12, "gradient": 1e-11},
    "float32": {"output": 2e-5, "gradient": 2e-4},
    "tf32": {"output": 1e-2, "gradient": 3e-2},
    "bfloat16": {"output": 4e-2, "gradient": 1e-1},
}


def check_parity(case: Case, entries: Sequence[Contender]) -> dict[str, dict[str, float]]:
    """Compare every contender with float64, at the case's batch and width and a few steps.

    Outputs are compared with torch.nn, for slstm with a loop over its step; ``"dsf"`` with the published procedure; and
    every rule of statefeed, with enough corrections to be exact, with backpropagation through time. Of a forward pass
    there are only the outputs. Padded sequences give other outputs than packed ones in the reverse direction, so that
    they are not compared there.

    Args:
        case: the comparison.
        entries: its contenders.

    Returns:
        name -> the largest error of each check, relative to the largest value.

    Raises:
        ParityError: an error is above the allowed one.
    """
    exact = case.truth()
    truth = Contender("torch.nn", "float64", exact, exact, SHIPPED, False)
    paper = Contender("published", "float64", exact, lambda x: published(exact, x), SHIPPED, False)
    compared = any(entry.implementation == "published" for entry in entries)
    found: dict[str, dict[str, float]] = {}
    for entry in entries:
        errors = found[entry.name] = {}
        if entry.padded and case.bidirectional:
            continue
        with applied(entry.setting):
            data = case.data(min(case.shape.T, _PARITY_STEPS))
            y = _rows(case, entry, data)
            errors["output"] = _hold(case, entry, "output", {"y": y}, {"y": truth.outputs(data.to(torch.float64))})
            if not case.training:
                continue
            if entry.variant == "dsf" and compared:
                errors["dsf"] = _hold_gradients(case, entry, paper, data)
            if entry.implementation == "statefeed":
                data = case.data(min(case.shape.T, _CORRECTED_STEPS))
                errors["corrected"] = _hold_gradients(case, _corrected(entry, _steps(data) - 1), truth, data)
    return found


def _rows(case: Case, entry: Contender, data: Input) -> Tensor:
    """The outputs of a contender in the order of the case's rows."""
    if not entry.padded:
        return entry.outputs(data)
    lengths = case.lengths(_steps(data))
    y = entry.outputs(case.data(_steps(data), padded=True))
    return pack_padded_sequence(y, torch.tensor(lengths, device="cpu")).data


def _steps(data: Input) -> int:
    return len(data.x if data.batch_sizes is None else data.batch_sizes)


def _corrected(entry: Contender, corrections: int) -> Contender:
    """The same layer under its rule with enough corrections to be exact."""
    rule = sf.Feedback(entry.variant)
    if rule.exact:
        return entry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some rules diverge with many steps, none with so few
        complete = sf.Feedback(rule.diagonal, corrections=corrections)

    def forward(x: Any) -> tuple[Any, Any]:
        entry.layer.feedback = complete
        try:
            return entry.forward(x)
        finally:
            entry.layer.feedback = rule

    return entry._replace(forward=forward)


def _hold_gradients(case: Case, entry: Contender, truth: Contender, data: Input) -> float:
    y = entry.outputs(data)
    exact = data.to(torch.float64)
    expected = truth.gradients(exact, truth.outputs(exact))
    return _hold(case, entry, "gradient", entry.gradients(data, y), expected)


@torch.no_grad()
def _hold(case: Case, entry: Contender, what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    allowed, largest = _ALLOWED[case.dtype][what], 0.0
    for name, value in expected.items():
        error = float((actual[name].double() - value).abs().max() / value.abs().max())
        if not error <= allowed:
            raise ParityError(
                f"{case}: the {what} {name} of {entry.name} must agree with float64 within {allowed:.0e} of its "
                f"largest value, got {error:.1e}; nothing was timed"
            )
        largest = max(largest, error)
    return largest
