"""Comparison of two gradients: cosine, norm ratio and sign agreement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Comparison of a gradient with the exact one.

    Attributes:
        cosine: cosine of the angle between the two; NaN if either is zero.
        norm_ratio: norm under the rule divided by the exact norm; NaN if the exact gradient is zero.
        sign_agreement: fraction of entries with the correct sign, among those with a nonzero exact gradient; NaN if
            there is no such entry.
    """

    cosine: float
    norm_ratio: float
    sign_agreement: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.3f}, norm ratio {self.norm_ratio:.3f}, equal signs {self.sign_agreement:.1%}"


def agreement_of(ours: list[Tensor | None], exact: list[Tensor | None]) -> Agreement:
    """The comparison of gradients of the same tensors; a pair with a missing one is left out."""
    pairs = [(_real(g), _real(h)) for g, h in zip(ours, exact, strict=True) if g is not None and h is not None]
    nan = float("nan")
    if not all(bool(v.isfinite().all()) for pair in pairs for v in pair):
        return Agreement(nan, nan, nan)
    dot = sum(float(g @ h) for g, h in pairs)
    same_sign = sum(int(((g.sign() == h.sign()) & (h != 0)).sum()) for g, h in pairs)
    nonzero = sum(int((h != 0).sum()) for _, h in pairs)
    rule_norm, exact_norm = (sum(float(v @ v) for v in grads) ** 0.5 for grads in zip(*pairs, strict=True))
    return Agreement(
        dot / (rule_norm * exact_norm) if rule_norm and exact_norm else nan,
        rule_norm / exact_norm if exact_norm else nan,
        same_sign / nonzero if nonzero else nan,
    )


def _real(gradient: Tensor) -> Tensor:
    """All entries as float64; the real and imaginary part of a complex entry are two entries."""
    return (torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient).double().flatten()
