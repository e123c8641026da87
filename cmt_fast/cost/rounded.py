"""Rows of a consistency stage in 16 bits that are computed in fp32 all the same, before a run has measured which.

The rule (objectives/rounding.py) measures the network that a stage begins with. Until then the share of times beyond its limit is
a small network's, as `python -m bench rounding` measured it at each q: predicted, by another network. It goes with q over the
limit, as the ratio there does with the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cmt_fast.config.schema import Ect
from cmt_fast.cost.flops import Term
from cmt_fast.objectives.rounding import wide_rows
from cmt_fast.run.resolved import ResolvedStage

# q, and the share of times whose ratio was beyond LIMIT: 1 where all were, and the stage refused
BEYOND = {
    "bf16": ((4, 0.0), (16, 0.125), (64, 0.1875), (256, 0.5625), (1024, 0.875), (4096, 1.0)),
    "fp16": ((4, 0.0), (16, 0.0), (64, 0.0625), (256, 0.1875), (1024, 0.25), (4096, 0.8125)),
}
LIMIT, SOURCE = 0.1, "cpu/rounding.json, of the network of `gmm`"


def beyond(precision: str, q: float) -> float:
    """The share of times beyond LIMIT at q, between those that were measured by the logarithm of q."""
    known = BEYOND[precision]
    if q <= known[0][0]:
        return known[0][1]
    for (a, low), (b, high) in zip(known, known[1:]):
        if q <= b:
            return low + (high - low) * math.log(q / a) / math.log(b / a)
    return known[-1][1]


def _parts(resolved: ResolvedStage, precision: str) -> list[float]:
    """The share of times beyond the stage's limit, part by part of its schedule; none where the rule does not apply."""
    o, limit = resolved.config.objective, resolved.config.rounding_limit
    if not isinstance(o, Ect) or precision not in BEYOND:
        return []
    return [beyond(precision, o.q ** (k + 1) * LIMIT / limit) for k in range(o.doublings + 1)]


def share(resolved: ResolvedStage, processes: int, precision: str | None = None) -> float:
    """Of the objective's rows, those in fp32, the mean over the stage; precision: the stage's, unless another is asked about.

    Rows are counted for a pass of one process, as the rule counts them: fewer rows leave a larger share to fp32.
    """
    parts = _parts(resolved, precision or resolved.config.products)
    rows = max(1, resolved.rows[0] // (processes * resolved.grad_accum_steps(processes)))
    return sum(wide_rows(p, rows) / rows for p in parts) / len(parts) if parts else 0.0


def refused(resolved: ResolvedStage) -> bool:
    """Whether the rule would refuse the stage: no time of any part is resolved."""
    parts = _parts(resolved, resolved.config.products)
    return bool(parts) and all(p == 1 for p in parts)


def split(work: Iterable[Term], resolved: ResolvedStage, processes: int, precision: str | None = None) -> list[Term]:
    """The same work with the student's calls that are in fp32 marked."""
    part, own = share(resolved, processes, precision), resolved.rows[0] / resolved.config.batch
    return [t._replace(wide=part * min(t.times, own)) if part and t.of == "student" else t for t in work]


def note(resolved: ResolvedStage, processes: int) -> str:
    """A line for people; "" where nothing is to be said."""
    part = share(resolved, processes)
    if not part:
        return ""
    if refused(resolved):
        return (
            f"{resolved.name}: {resolved.config.products} resolves no step of it, and it would be refused (by {SOURCE})"
        )
    what = f"about {part:.0%} of its rows are computed in fp32, beyond rounding_limit"
    return f"{resolved.name}: {what} (by {SOURCE}; measured when the stage begins)"
