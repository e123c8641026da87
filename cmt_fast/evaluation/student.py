"""Student's t: the ends of intervals, and one-sided tests that a mean is below a number or one of two paired samples lower.

The distribution function is a finite sum for a whole number of degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and
26.7.4), so no library of statistics is needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import fmean, stdev


def below(t: float, degrees: int) -> float:
    """P(T <= t) of Student's t with `degrees` >= 1 of freedom."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for k in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    between = 2 / math.pi * (theta + sine * total) if degrees % 2 else sine * total
    return 0.5 * (1 + between)


@functools.cache
def point(degrees: int, share: float = 0.975) -> float:
    """The t below which `share` >= 1/2 of Student's t with `degrees` of freedom lies, by bisection."""
    low, high = 0.0, 1.0
    while below(high, degrees) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle, degrees) < share else (low, middle)
    return high


def mean_below(values: Sequence[float], target: float) -> float:
    """p of a one-sided one-sample t test that the mean of what values (n >= 2) are drawn from is below the target: the
    probability of a mean this low or lower where the true one is the target.

    1 where a value is not finite. Values that are all alike have no spread to test by: 0 below the target, else 1.
    """
    if not all(map(math.isfinite, values)):
        return 1.0
    mean, spread = fmean(values), stdev(values)
    if not spread:
        return float(mean >= target)
    return below((mean - target) / (spread / math.sqrt(len(values))), len(values) - 1)


def pairs_below(a: Sequence[float], b: Sequence[float]) -> float:
    """The same that a lies below b, pair by pair (n >= 2)."""
    return mean_below([x - y for x, y in zip(a, b, strict=True)], 0.0)
