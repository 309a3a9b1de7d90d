"""The steps of a user's cell: one step, its input for all steps at once, and the loop over time."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from statefeed.custom.split import SplitCell, split_cell

StepFunction = Callable[[Any, Tensor, Any], Any]


class Steps(NamedTuple):
    """How the steps of a cell are computed.

    Attributes:
        cell: the cell.
        split: its two parts; None if it is called as a whole.
        compiled: the function of a step, compiled; None without ``compile_step``.
    """

    cell: nn.Module
    split: SplitCell | None
    compiled: StepFunction | None

    @property
    def function(self) -> StepFunction:
        """One step, ``function(cell, inputs, state)``, not compiled."""
        return _whole if self.split is None else self.split.step

    def inputs(self, x: Tensor) -> Tensor:
        """What a step takes at every step, (T, B, .): x itself, or the part of the cell that depends on x alone."""
        if self.split is None:
            return x
        rows = self.split.project_input(self.cell, x.flatten(0, 1))
        if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) != x.shape[0] * x.shape[1]:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"{type(self.cell).__name__}.project_input must return a tensor with one row for each row of x, "
                f"({x.shape[0] * x.shape[1]}, .), got {got}"
            )
        return rows.reshape(*x.shape[:2], rows.shape[1])

    def loop(self, inputs: Tensor, initial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All states, each (T, B, .)."""
        function = self.compiled or self.function
        single, shapes = len(initial) == 1, [s.shape for s in initial]
        if self.compiled is not None and torch.is_grad_enabled():
            # Later states require a gradient. If the first does as well, there is one graph and not two.
            initial = tuple(s if s.requires_grad else s.detach().requires_grad_() for s in initial)
        state, states = initial, []
        for row in inputs:
            state = self._checked(function(self.cell, row, state[0] if single else state), shapes)
            states.append(state)
        return tuple(torch.stack(s) for s in zip(*states, strict=True))

    def step(
        self, inputs: Tensor, state: tuple[Tensor, ...], parameters: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """One step, not compiled.

        Args:
            inputs: (rows, .)
            state: tensors (rows, .)
            parameters: values to use in place of the cell's, by name.

        Returns:
            The next state.
        """
        given = state[0] if len(state) == 1 else state
        if parameters:
            named = {f"cell.{name}": value for name, value in parameters.items()}
            after = functional_call(_StepModule(self.cell, self.function), named, (inputs, given))
        else:
            after = self.function(self.cell, inputs, given)
        return self._checked(after, [s.shape for s in state])

    def _checked(self, after: Any, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """The state that a cell returned, as a tuple."""
        if isinstance(after, Tensor):  # first: it is called at every step
            if len(shapes) == 1 and after.shape == shapes[0]:
                return (after,)
            after = (after,)
        elif isinstance(after, (tuple, list)) and [getattr(s, "shape", None) for s in after] == shapes:
            return tuple(after)
        expected = [tuple(shape) for shape in shapes]
        got = [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in after or ()]
        raise ValueError(
            f"{type(self.cell).__name__} must return only its next state, with the shapes {expected}, got "
            f"{got or type(after).__name__}"
        )


def steps_of(cell: nn.Module, compiled: Callable[[StepFunction], StepFunction] | None = None) -> Steps:
    """The steps of a cell.

    Args:
        cell: the cell.
        compiled: returns the compiled form of the function of a step; None to run it as it is.
    """
    steps = Steps(cell, split_cell(cell), None)
    return steps if compiled is None else steps._replace(compiled=compiled(steps.function))


def compile_step(function: StepFunction, options: dict[str, Any]) -> StepFunction:
    """A step under ``torch.compile``.

    Args:
        function: one step.
        options: arguments of ``torch.compile``. By default the step is one graph, and a cell that cannot be compiled so
            raises the compiler's error.
    """
    # Dynamo limits the recompilations of each code object. Without a copy all cells of a program would share the limit.
    code = function.__code__.replace()
    copied = types.FunctionType(code, function.__globals__, function.__name__)
    compiled: StepFunction = torch.compile(copied, **{"fullgraph": True, **options})
    return compiled


def _whole(cell: Any, x: Tensor, state: Any) -> Any:
    return cell(x, state)


class _StepModule(nn.Module):
    """One step as a module, for ``functional_call``."""

    def __init__(self, cell: nn.Module, function: StepFunction) -> None:
        super().__init__()
        self.cell = cell
        self.function = function

    def forward(self, inputs: Tensor, state: Any) -> Any:
        return self.function(self.cell, inputs, state)
