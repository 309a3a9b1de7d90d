"""Registration of an operator with torch.utils.flop_counter.FlopCounterMode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry, register_flop_formula


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Count an operator by a formula of its arguments, shapes in place of tensors."""
    register_flop_formula(operator)(formula)
    # Operators are loaded at first use, and a counter copies the table when it is made.
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry[operator] = flop_registry[operator]
