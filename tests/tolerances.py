"""Tolerances of comparisons: errors relative to the largest expected value, bounded by the error of a reference.

The rule for float32 and below: the error against float64 is at most a small multiple of the error that the reference
itself makes at that precision. In float64, two right answers differ by the order of their sums alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# Two float64 answers to one question: a few thousand roundings of 1.1e-16 at most, in the sizes tested here.
SAME = 1e-11
# A corrected rule is exact only by cancellation: corrections add and take away terms that grow like binom(T, k), up to
# about 1e3 at the lengths tested here.
SAME_BY_CANCELLATION = 1e-9
# What a wrong rule must exceed, so that a case that must differ cannot pass by rounding: nine orders above SAME.
DIFFERENT = 1e-2
# Our float32 error, in units of the reference's own: another order of summation, powers by squaring, another tanh.
# A product in bfloat16 or TF32 where float32 is due would cost a thousand.
MULTIPLE = 8.0
# The reference may be right to the last bit by luck; nobody is asked for less than a few units of roundoff.
ROUNDOFFS = 8.0


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest value expected (or of one, where nothing but zeros is)."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} where {tuple(expected.shape)} is expected"
    if not expected.numel():
        return 0.0
    actual, expected = (
        v.detach().to(torch.complex128 if v.is_complex() else torch.float64) for v in (actual, expected)
    )
    assert torch.isfinite(torch.view_as_real(actual) if actual.is_complex() else actual).all(), "not finite"
    return float((actual - expected).abs().max() / (expected.abs().max() or 1.0))


def largest_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest error among named values, and its name."""
    assert actual.keys() == expected.keys(), f"{sorted(actual)} where {sorted(expected)} is expected"
    return max((error(actual[name], expected[name]), name) for name in expected)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float = SAME) -> None:
    """All named values are equal, up to the order of summation in float64 (or to the bound given)."""
    worst, name = largest_error(actual, expected)
    assert worst <= within, f"{name}: error {worst:.1e} where {within:.1e} is allowed"


def assert_different(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Some named value differs by far more than any rounding."""
    worst, name = largest_error(actual, expected)
    assert worst > DIFFERENT, f"the largest difference, {worst:.1e} in {name}, is no proof of one"


def assert_as_accurate(
    actual: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    multiple: float = MULTIPLE,
) -> None:
    """The error against float64 is at most a small multiple of the reference's own error at the same precision."""
    assert actual.keys() == reference.keys() == exact.keys()
    for name, value in exact.items():
        allowed = multiple * max(error(reference[name], value), ROUNDOFFS * torch.finfo(reference[name].dtype).eps)
        found = error(actual[name], value)
        assert found <= allowed, f"{name}: error {found:.1e} where {allowed:.1e} is allowed"
