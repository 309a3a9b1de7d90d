"""Quantiles of Student's t distribution for whole degrees of freedom."""

import functools
import math

_HALVINGS = 60  # of the bracket of an angle: more than a float64 resolves


def probability(t: float, freedom: int) -> float:
    """The probability of values between -t and t, by the finite series for whole degrees of freedom.

    The series are 26.7.3 and 26.7.4 of Abramowitz and Stegun, *Handbook of Mathematical Functions*.

    Args:
        t: at least 0.
        freedom: degrees of freedom, at least 1.

    >>> round(probability(1.0, 1), 12), round(probability(math.sqrt(2), 2), 9) == round(math.sqrt(0.5), 9)
    (0.5, True)
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@functools.cache
def quantile(level: float, freedom: int) -> float:
    """The t for which values between -t and t have a probability.

    Args:
        level: probability, between 0 and 1, both excluded.
        freedom: degrees of freedom, at least 1.

    >>> round(quantile(0.95, 2), 6), round(quantile(0.95, 4), 6)
    (4.302653, 2.776445)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if probability(math.sqrt(freedom) * math.tan(middle), freedom) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)
