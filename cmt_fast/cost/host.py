"""How long a step keeps its host busy: calls of ops counted, times what a call took on the host of a measured step.

A GPU that waits for its host is no faster for having less to do: passes of few rows are bound by this. A step or a rollout that
is a CUDA graph needs no host, which the local engine's are on a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cmt_fast.config.schema import Stage
from cmt_fast.cost import activations
from cmt_fast.cost import flops as flops_
from cmt_fast.cost.flops import Network, Term
from cmt_fast.cost.hardware import Card
from cmt_fast.cost.published import step_work
from cmt_fast.run.resolved import ResolvedStage

CALLS = {"forward": 1, "backward": 2, "recompute": 1, "tangent": 1, "input_gradient": 1}  # over a forward's


class Host(NamedTuple):
    """Microseconds of a step, and where the time of a call is from."""

    us: float
    source: str


def captured(stage: Stage, zero: int | None, card: Card) -> bool:
    """Whether a stage's step is taken to need no host: a CUDA graph, or compiled, whose launches nobody counts here."""
    return card.watts is None or stage.compile or (zero is None and stage.cuda_graph is not False)


def of_stage(
    resolved: ResolvedStage, known: dict[str, Network], data: tuple[tuple[int, ...], int], card: Card, passes: int
) -> Host | None:
    """A step without CUDA graphs but those of rollouts; None where no step's host was measured on such a card.

    data: shape and classes of its rows.
    """
    each = call_us(card)
    if each is None:
        return None
    of = lambda net: _calls(net, resolved.run.path, *data)
    count = passes * sum(_times(t) * of(known[t.of]) for t in flops_.terms(resolved) if not t.rows)
    return Host(count * each.us, each.source)


def call_us(card: Card) -> Host | None:
    """Microseconds of a call on the hosts of a card's measured eager steps, the mean; None where there are none."""
    found = []
    for s in (s for s in card.steps if s.host):
        net, side = flops_.dit_network(s.width, s.depth, s.tokens), 2 * math.isqrt(s.tokens)
        calls = sum(_times(t) * _calls(net, "linear", (4, side, side), 1000) for t in step_work(s.objective, 0))
        found.append((s.host / calls, s.source))
    return Host(sum(us for us, _ in found) / len(found), found[0][1]) if found else None


def _times(term: Term) -> int:
    return math.ceil(term.times) * CALLS[term.kind]


def _calls(net: Network, path: str, shape: tuple[int, ...], classes: int) -> int:
    """Of one forward; a feature network's few are not counted."""
    return activations.calls(net.model, path, shape, classes, True) if net.model else 0
