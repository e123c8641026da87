"""The work of an objective, counted: its loss is taken on a network of no weight that counts the rows it is called with.

So no table says what a kind costs. What is counted are rows: one of a call with a gradient is a forward and a backward, one of
a call without is a forward, one with a tangent a forward more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cmt_kernels import Dual
from cmt_kernels.dual import tangent, value
from torch import Tensor

from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.objectives.batch import Batch, LossContext, Points
from cmt_fast.objectives.distance import PERCEPTUAL

SHAPE = (2,)  # of the rows that are counted with
PARTS = 10  # of a stage, in each of which a step is counted


class Work(NamedTuple):
    """Network work for one row of an objective: calls with a gradient, without one, tangents, and calls of the teacher."""

    trained: float
    plain: float
    tangents: float
    teacher: float

    @property
    def forwards(self) -> float:
        """Forwards of student and teacher together, a backward counted as two and a tangent as one."""
        return 3 * self.trained + self.plain + self.tangents + self.teacher


class Counter:
    """A network that is x itself; rows: what it was called with, by kind of call. second: what stands beside the output."""

    def __init__(self, second: Callable[[Tensor], Tensor]) -> None:
        self.weight, self.second = torch.zeros((), requires_grad=True), second
        self.trained = self.plain = self.tangents = 0

    def __call__(
        self, x: Any, t: Any, r: Any = None, labels: Any = None, drop: Any = None, seeds: Any = None, *more: Any
    ):
        """x: (B, ...) or a Dual of k tangents -> the same; a pair with what stands beside it where `more` asks."""
        rows, k = len(value(x)), next((len(tangent(a)) for a in (x, t, r) if isinstance(a, Dual)), 0)
        self.trained += rows * torch.is_grad_enabled()
        self.plain += rows * (not torch.is_grad_enabled())
        self.tangents += k
        y = value(x) + self.weight
        out = Dual(y, torch.zeros_like(y[:k].detach())) if k else y
        return (out, self.second(y)) if more and more[0] else out


def work(objective: Any, path: ProbabilityPath, rows: int) -> Work:
    """What a row of an objective costs in a batch of `rows`; the mean over its stage where a schedule changes it."""
    plain = {"distance": "squared_l2"} if getattr(objective, "distance", None) in (*PERCEPTUAL, "features") else {}
    plain |= {"space": "data"} if getattr(objective, "space", None) in PERCEPTUAL else {}
    objective = dataclasses.replace(objective, **plain)
    found = [_work(objective, path, rows, (k + 0.5) / PARTS) for k in range(PARTS)]
    return Work(*(sum(n) / PARTS for n in zip(*found)))


@functools.lru_cache(maxsize=256)
def _work(objective: Any, path: ProbabilityPath, rows: int, progress: float) -> Work:
    from cmt_fast.objectives import OBJECTIVES  # which names every objective

    spec, ids = OBJECTIVES[objective.kind], torch.arange(rows)
    beside = (lambda y: y.flatten(1).sum(1)) if path.name == "ve" else (lambda y: y)
    net, teacher = Counter(beside), Counter(beside)
    context = LossContext(path, Random(0, 0, 0), teacher, progress, nimg=1 << 40)
    labels, drop = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
    x, half = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.full((rows,), 0.5)
    given: Any = Batch(x, labels, ids, drop)
    if spec.draws == "trajectories":
        given = Points(x, half, x, half / 2, labels, None, ids)
    with torch.enable_grad():
        spec.function(net, given, objective, context)
    return Work(*(n / rows for n in (net.trained, net.plain, net.tangents, teacher.trained + teacher.plain)))
