"""Check of a cell's formulas against autograd through its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed.cells.protocol import Cell, Step, projected_w_hh

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_ROWS = 6
_ALLOWED = 1e-9  # relative to the largest value, in float64


def check_cell(cell: Cell, hidden_size: int = 5) -> None:
    """Raise unless the formulas of a cell are those of its step, on random rows in float64.

    A wrong formula makes wrong gradients and no error, so the tests of a new cell should call this.

    Args:
        cell: any cell.
        hidden_size: H, number of units, at least 2.

    Raises:
        ValueError: a formula is not the derivative of the step, or has a wrong form.

    Cost: one backward pass through a step of 6 rows, and one for every unit of the state.

    Example:
        >>> from statefeed.cells import CELLS
        >>> check_cell(CELLS["gru"])
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=random, device="cpu")

    H, P = hidden_size, hidden_size - 1 if cell.projects else hidden_size
    shapes, widths, count = cell.weight_shapes(1, H, P), cell.state_widths(H, P), cell.gradient_parts
    if others := [name for name in shapes if name not in _WEIGHTS]:
        raise ValueError(
            f"cell {cell.name!r}: the weights of a cell must be out of {', '.join(_WEIGHTS)}, got {', '.join(others)}: "
            "run a cell with other parameters in statefeed.Recurrent"
        )
    w_hh, w_hr = draw(*shapes["weight_hh"]), draw(*shapes["weight_hr"]) if cell.projects else None
    inputs = draw(_ROWS, cell.gates * H).requires_grad_()
    previous = tuple(draw(_ROWS, width).requires_grad_() for width in widths)
    h_only = previous[0].detach()  # a leaf of its own: the path through the weights is apart from the direct path
    h_only.requires_grad_()
    with torch.enable_grad():
        hidden = cell.hidden_product(h_only, w_hh, None)
        unprojected = cell.step(inputs, hidden, previous)
        _check_form(cell, "step", unprojected, [H, *widths[1:]])
        after = unprojected if w_hr is None else (F.linear(unprojected[0], w_hr), *unprojected[1:])
    with torch.no_grad():
        at = cell.linearize(Step(previous, after, lambda: (inputs, hidden)))
        if type(at) is not getattr(cell, "saved_type", None):
            raise ValueError(f"cell {cell.name!r}: linearize must return saved_type, got {type(at).__name__}")
        # What the constant parts do cancels in h only, so the gradients of the other parts are then taken as zero.
        grads = [draw(*s.shape) * (not k or not cell.constant_states) for k, s in enumerate(unprojected[:count])]
        same_step = cell.same_step(at, grads[0])
        _check_form(cell, "same_step", same_step, widths[1:count])
        delta = (grads[0], *(g + through_h for g, through_h in zip(grads[1:], same_step, strict=True)))
        local = cell.local_gradient(at, delta)
        _check_form(cell, "local_gradient", local, [cell.gates * H] * 2)
        direct_path = cell.direct_path(at)
        _check_form(cell, "direct_path", direct_path, widths[:count], optional=True)
        jacobian = cell.jacobian_diagonal(at, projected_w_hh(w_hh, w_hr))
        _check_form(cell, "jacobian_diagonal", jacobian, widths[:count])
    leaves = (inputs, hidden, *previous[:count])
    expected = torch.autograd.grad(unprojected[:count], leaves, grads, retain_graph=True, materialize_grads=True)
    _check_equal(cell, "local_gradient at inputs", local[0], expected[0])
    _check_equal(cell, "local_gradient at hidden", local[1], expected[1])
    for name, path, d, grad in zip(cell.states, direct_path, delta, expected[2:], strict=False):
        _check_equal(cell, f"direct_path of {name}", torch.zeros_like(grad) if path is None else path * d, grad)
    for k, (name, found) in enumerate(zip(cell.states, jacobian, strict=False)):
        sources = (previous[k],) if k else (previous[0], h_only)
        _check_equal(cell, f"jacobian_diagonal of {name}", found, _diagonal(after[k], sources))
    shared = cell.shared_gates * H
    _check_equal(cell, "shared_gates: local_gradient at hidden", local[1][:, :shared], local[0][:, :shared])
    if cell.has_direct_path != any(path is not None for path in direct_path):
        raise ValueError(f"cell {cell.name!r}: has_direct_path must be {not cell.has_direct_path}, as its direct_path")


def _diagonal(after: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
    """The derivative of every unit with respect to itself one step earlier, summed over the paths, (rows, width)."""
    columns = []
    for unit in range(after.shape[1]):
        grads = torch.autograd.grad(after[:, unit].sum(), sources, retain_graph=True, materialize_grads=True)
        columns.append(torch.stack([grad[:, unit] for grad in grads]).sum(0))
    return torch.stack(columns, 1)


def _check_form(cell: Cell, function: str, found: Any, widths: Any, optional: bool = False) -> None:
    expected = [(_ROWS, width) for width in widths]
    is_tuple = isinstance(found, tuple)
    got = [tuple(t.shape) if isinstance(t, Tensor) else None for t in found] if is_tuple else type(found).__name__
    right = is_tuple and len(got) == len(expected)
    if not right or any(g != e and not (optional and g is None) for g, e in zip(got, expected, strict=True)):
        raise ValueError(f"cell {cell.name!r}: {function} must return a tuple of tensors {expected}, got {got}")


def _check_equal(cell: Cell, what: str, found: Tensor, expected: Tensor) -> None:
    if not expected.numel():
        return
    difference, largest = float((found - expected).abs().max()), max(float(expected.abs().max()), 1.0)
    if not difference <= _ALLOWED * largest:
        raise ValueError(
            f"cell {cell.name!r}: {what} must be the derivative of step, got a difference of {difference:.3g} at "
            f"values up to {largest:.3g}"
        )
