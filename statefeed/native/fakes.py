"""Fake implementations of the operators, for torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import torch


def _no_results(*_: Any) -> None:
    """Every operator writes into its arguments."""


for _name in ("layer_forward", "layer_backward", "sum_jacobians", "head_loss"):
    torch.library.register_fake(f"statefeed::{_name}", _no_results)
