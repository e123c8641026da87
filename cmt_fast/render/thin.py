"""Long curves with few points: nothing that a full drawing would show is lost.

A curve of 500,000 rows in a figure of 400 pixels has a thousand rows in each column of pixels, and what is seen of them is the
span from the lowest to the highest. So each of BINS parts of a curve is drawn as just these two rows, in their order, with the
curve's first and last row: a spike of one row stays, an average would hide it. A curve of at most 2 BINS rows is drawn as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BINS = 600


def extremes(x: Sequence[float], y: Sequence[float], bins: int = BINS) -> tuple[list[float], list[float]]:
    """The rows to draw of a curve, (x, y) as lists. Of rows that are no finite numbers each part keeps its first, for the gap
    that it leaves, beside the extremes of the others.
    """
    if len(y) <= 2 * bins:
        return list(x), list(y)
    values = np.asarray(y, dtype=np.float64)
    edges = np.linspace(0, len(values), bins + 1).astype(int)
    chosen = {0, len(values) - 1}
    known = np.isfinite(values)
    for a, b in zip(edges[:-1], edges[1:]):
        low, high = (np.where(known[a:b], values[a:b], none) for none in (np.inf, -np.inf))
        chosen |= {a + int(np.argmin(low)), a + int(np.argmax(high))}
        if not known[a:b].all():
            chosen.add(a + int(np.argmin(known[a:b])))
    kept = sorted(chosen)
    return [x[i] for i in kept], [y[i] for i in kept]
