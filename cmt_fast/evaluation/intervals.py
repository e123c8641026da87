"""How far a distance, and the ratio of two, would move with other samples of the same networks: 95 % intervals.

Delete-a-group jackknife (Kott 2001): samples stand in G groups, and the figure is taken G times, each time without one. The
variance is (G - 1) / G times the squares about their mean. A bootstrap would draw samples twice, which a Fréchet
distance takes for a loss of variety: its values lie higher than the figure itself. Distances are positive and their ratios
matter, so all of it is done in logarithms. Networks draw from the same noise and labels, sample for sample, so the ratio of
two is taken group by group and what is common to both falls out of it.

An interval knows nothing of other seeds of training, nor of other real data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cmt_fast.evaluation import student

GROUPS = 20


class Interval(NamedTuple):
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def interval(value: float, left_out: Sequence[float]) -> Interval | None:
    """left_out: the figure without each group in turn; None for fewer than two groups or figures that are not positive."""
    if len(left_out) < 2 or min(value, *left_out) <= 0 or not all(map(math.isfinite, (value, *left_out))):
        return None
    logs, groups = [math.log(v) for v in left_out], len(left_out)
    mean = sum(logs) / groups
    error = math.sqrt((groups - 1) / groups * sum((v - mean) ** 2 for v in logs))
    way = student.point(groups - 1) * error
    return Interval(value, value * math.exp(-way), value * math.exp(way))


def ratio(a: float, b: float, a_out: Sequence[float], b_out: Sequence[float]) -> Interval | None:
    """a / b, group by group; None as `interval`, and where the two have other groups."""
    if len(a_out) != len(b_out) or min(a, b, *a_out, *b_out) <= 0:
        return None
    return interval(a / b, [x / y for x, y in zip(a_out, b_out)])
