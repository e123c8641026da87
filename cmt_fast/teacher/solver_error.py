"""The teacher's solver chosen by measurement: the endpoint error of order x NFE x grid, from step doubling.

A setting with N network calls is rolled out with N, 2N and 4N from the same noise; a, b, c are its endpoints. With
d1 = RMS(a - b) and d2 = RMS(b - c) the observed order of convergence is p = log2(d1 / d2).

* Where differences shrink as an asymptotic solver's do, in one direction (their cosine is at least .8) and at p of
  .8 or more (no solver here has an order below 1), the limit is Richardson's: c + (c - b) / (2^p - 1).
* Elsewhere (few steps; a scheme whose order changes with N, as DPM-Solver++'s ladder 1, 2, 3, .., 3, 2, 1) p means
  nothing, and an extrapolation by it would be noise: the limit is c itself.

The estimate is RMS(a - limit). One doubling alone, d1, is half the error of a first-order solver and up to 2.7 times
that of a solver at four calls; the nominal order in place of p is wrong for order 3, which converges like 2.

The interval: RMS(a - c) -+ what c itself misses, which is d2 / (2^p - 1) with p between .5 and 1, or d2 if p is
larger (every further doubling at least halves what is left), each at the 2.5 and 97.5 % quantiles of a bootstrap over
trajectories. It holds no bias that doubling cannot see: of the network, of `t_min` above 0, of the solver `jump`,
whose limit is the flow map's own composition and not the ODE, or of a rollout in another precision. The endpoint
alone is looked at; it holds what went wrong at every node before it.

All endpoints are kept, so a rollout serves every comparison that it is part of. The distance to one common limit, that
of the setting with the smallest estimate, is given beside: a solver that converges to something else shows there. It is
no part of the choice. Euler is DPM-Solver++ of order 1 on both paths, so it is no candidate of its own. VE has one grid.
On linear flow the shift moves the nodes, and with them the times that the student is trained on, so other grids than the
recipe's are measured and proposed only where they are asked for, never by `auto`.

The choice. The theory bounds the gradient's bias by the target's squared error, epsilon + (solver error)^2, where
epsilon = E|f(x_T, T) - Psi(x_T)|^2 is the student's own one-step error. So a setting is good enough when the upper end
of its error is at most `MARGIN` sqrt(epsilon); the cheapest such is taken. The bound counts both errors alike, but they
are not: where a squared mid-training loss is at rest the student's own error is orthogonal to its Jacobian and drops out of
the gradient, the solver's is the same lean in every target and stays. So the margin is a quarter, a sixteenth of
epsilon in the squares. A half was tried first and is too much: on digits (seed 0, bench/experiments/tune.py) order 2 at 8 calls,
.039 beside a student's .11, has a Fréchet distance of .54 by the solver itself and .54 in the student, where 16 calls of
order 3, .007, lead to .30, though both students are equally far from Psi (.11). The margin was set on that seed.
Seed 1 bore it out: order 3 at 12 calls is picked, .016 beside .11; that student's distances in one and two steps are
.31 and .28, with 16 calls .34 and .32.

The cost is the teacher's calls for a student row, nfe over the points drawn of a trajectory: where all points are drawn
that is one whatever the nfe, and among settings of equal cost the most accurate is taken.
All errors are RMS per dimension.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.config.schema import Trajectories
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.guidance import Net
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import rollout, table
from cmt_fast.runtime import distributed, signals
from cmt_fast.teacher.pool import Drawn, drawn, start_labels

NFE = (4, 6, 8, 12, 16, 24, 32, 48, 64)
SHIFTS = (1.0, 0.5, 2.0)  # grids of linear flow that are tried beside the recipe's own
COUNT, MARGIN = 256, 0.25  # trajectories; solver error over the student's
ALIKE, CLEAN, SLOWEST, RESAMPLES = 0.8, 0.8, 0.5, 200
ALONG, NODES, FINER = 64, 8, 4  # trajectories and nodes at which targets are checked, and calls of the check for one
_STAGE = 2**32 - 2  # of no training stage: trajectories that are measured are none that is trained on


class Solver(NamedTuple):
    """An order on a grid; with a number of network calls it is a table."""

    solver: str
    order: int
    shift: float

    def title(self) -> str:
        """As a table names it."""
        name = f"dpmpp {self.order}" if self.solver == "dpmpp" else self.solver
        return name if self.shift == 1 else f"{name}, shift {self.shift:g}"


class Estimate(NamedTuple):
    """What a setting's endpoint misses, RMS per dimension. observed: order of convergence, if any; clean: it was used.

    cost: teacher calls for a student row, without guidance's second.
    """

    setting: Solver
    nfe: int
    cost: float
    error: float
    low: float
    high: float
    observed: float | None
    clean: bool


class Along(NamedTuple):
    """What targets miss over the nodes of trajectories, RMS per dimension, and the upper end of its interval."""

    error: float
    high: float


class Endpoints:
    """The endpoints of settings from one set of starts, each rolled out once. Every rank rolls its share, all hold all."""

    def __init__(
        self, net: Net, path: ProbabilityPath, x: Tensor, labels: Tensor | None, config: Trajectories,
        advance: Callable[[int], None] = lambda calls: None,
    ) -> None:  # fmt: skip
        """x: (n, ...) starts of this rank; config: t_max, t_min and the rows of a rollout; advance: told the calls."""
        self.net, self.path, self.x, self.labels, self.config, self.advance = net, path, x, labels, config, advance
        self.count = len(x) * distributed.size()
        self.calls = 0  # network calls a trajectory, without guidance's second
        self.apart = 0  # those on some of the trajectories, over all of these
        self._known: dict[tuple[Solver, int], Tensor] = {}

    def at(self, setting: Solver, nfe: int) -> Tensor:
        """(n, D) float64 on the CPU, n over all ranks. Raises ValueError for a table that there is not."""
        if (setting, nfe) not in self._known:
            c = self.config
            plan = table(self.path, setting.solver, nfe, c.t_max, c.t_min, setting.order, setting.shift)
            parts = []
            for rows in torch.arange(len(self.x), device=self.x.device).split(c.rollout_batch):
                signals.look()  # all ranks have as many parts
                parts.append(rollout(self.net, self.path, plan, self.x[rows], self._labels(rows), dense=False))
            self._known[setting, nfe] = distributed.gather_rows(torch.cat(parts)).cpu().flatten(1)
            self.calls += nfe
            self.advance(nfe)
        return self._known[setting, nfe].double()

    def _labels(self, rows: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[rows]

    def limit(self, setting: Solver, nfe: int) -> tuple[Tensor, float | None, bool]:
        """Where nfe, 2 nfe, 4 nfe lead (n, D); the observed order; whether the limit is extrapolated by it."""
        a, b, c = (self.at(setting, nfe * k) for k in (1, 2, 4))
        first, second = a - b, b - c
        d1, d2 = (_size(x) for x in (first, second))
        if not (math.isfinite(d1) and d1 and math.isfinite(d2) and d2):
            return c, None, False
        order = math.log2(d1 / d2)
        clean = order >= CLEAN and float((first * second).mean()) >= ALIKE * d1 * d2
        return c - second / (2**order - 1) if clean else c, order, clean

    def cost(self, setting: Solver, nfe: int) -> float:
        """Teacher calls for a student row, without guidance's second."""
        return nfe / drawn(self.config, self.path.name, nfe // (2 if setting.solver == "heun" else 1))

    def estimate(self, setting: Solver, nfe: int) -> Estimate:
        """The setting's endpoint error by step doubling, with its interval; infinite where a rollout is not finite."""
        limit, order, clean = self.limit(setting, nfe)
        cost = self.cost(setting, nfe)
        a, b, c = (self.at(setting, nfe * k) for k in (1, 2, 4))
        own, reach, left = ((x - y).square().mean(1) for x, y in ((a, limit), (a, c), (b, c)))
        if not bool(torch.isfinite(own + reach + left).all()):
            return Estimate(setting, nfe, cost, math.inf, 0.0, math.inf, None, False)
        misses = 1 / (2 ** min(max(SLOWEST if order is None else order, SLOWEST), 1.0) - 1)
        own, reach, left = (_resampled(x) for x in (own, reach, left))
        low, high = torch.minimum(own, (reach - misses * left).clamp(min=0)), torch.maximum(own, reach + misses * left)
        low, high = float(torch.quantile(low[1:], 0.025)), float(torch.quantile(high[1:], 0.975))
        return Estimate(setting, nfe, cost, float(own[0]), low, high, order, clean)

    def along(self, setting: Solver, nfe: int, fine: Solver) -> Along:
        """What a setting's targets miss at its own nodes: x_N, which is the target of every x_i, beside Psi(x_i), by `fine` with
        FINER calls for each that is left from there. Of the first `ALONG` trajectories and at most `NODES` of their nodes, evenly
        over those that are drawn; infinite where a rollout is not finite."""
        c, rows = self.config, torch.arange(min(len(self.x), -(-ALONG // distributed.size())), device=self.x.device)
        plan = table(self.path, setting.solver, nfe, c.t_max, c.t_min, setting.order, setting.shift)
        nodes, squares = len(plan.times) - 1, []
        for part in rows.split(c.rollout_batch):
            signals.look()
            labels = self._labels(part)
            x = rollout(self.net, self.path, plan, self.x[part], labels)
            self._spend(nfe, len(part))
            own = []
            for i in checked(nodes):
                calls = FINER * (nodes - i)
                rest = table(self.path, fine.solver, calls, plan.times[i], c.t_min, fine.order)
                own.append((rollout(self.net, self.path, rest, x[i], labels, dense=False) - x[-1]).double().square())
                self._spend(calls, len(part))
            squares.append(torch.stack(own).flatten(2).mean((0, 2)))
        found = distributed.gather_rows(torch.cat(squares)).cpu()
        if not bool(torch.isfinite(found).all()):
            return Along(math.inf, math.inf)
        drawn = _resampled(found)
        return Along(float(drawn[0]), float(torch.quantile(drawn[1:], 0.975)))

    def _spend(self, calls: int, rows: int) -> None:
        """Calls on `rows` of this rank's trajectories, counted by the row."""
        self.apart += calls * rows * distributed.size()
        self.advance(calls * rows // len(self.x))

    def distance(self, e: Estimate, limit: Tensor) -> float:
        """RMS distance per dimension of a setting's endpoint to a limit (n, D)."""
        return _size(self.at(e.setting, e.nfe) - limit)


def checked(nodes: int) -> list[int]:
    """The nodes of `along`, of so many that targets are drawn from."""
    used = min(nodes, NODES)
    return [(2 * k + 1) * nodes // (2 * used) for k in range(used)]


def _size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _resampled(squares: Tensor) -> Tensor:
    """Root mean of squares (n,): of all, then of `RESAMPLES` draws with repetition, the same for every call. (1 + R,)."""
    n = len(squares)
    ids = Random(0, _STAGE, 0).integers(rng.SAMPLE, torch.arange(RESAMPLES * n), n).view(RESAMPLES, n)
    return torch.cat((squares.mean()[None], squares[ids].mean(1))).sqrt()


def starts(
    path: ProbabilityPath, config: Trajectories, shape: tuple[int, ...], classes: Drawn, seed: int, device: Any,
    count: int = COUNT, dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """This rank's share of the starting noise (n, ...) and labels, a share `dropout` of them the null class's.

    `count` is rounded up to whole shares.
    """
    share = -(-count // distributed.size())
    ids, random = torch.arange(share, device=device) + share * distributed.rank(), Random(seed, _STAGE, 1)
    x = random.normal(rng.START, ids, shape) * (config.t_max if path.name == "ve" else 1.0)
    return x, start_labels(random, ids, classes, dropout)


def settings(path: str, config: Trajectories, grids: bool = False) -> list[Solver]:
    """Orders to choose from, on the recipe's grid; grids: on others too. A flow map takes jumps and nothing else."""
    shifts = dict.fromkeys((config.shift, *SHIFTS)) if grids and path == "linear" else (config.shift,)
    kinds = (("dpmpp", 1), ("dpmpp", 2), ("dpmpp", 3), ("heun", config.order))
    if config.solver == "jump":
        kinds = (("jump", config.order),)
    return [Solver(kind, order, s) for s in shifts for kind, order in kinds]


def apply(config: Trajectories, setting: Solver, nfe: int) -> Trajectories:
    """The recipe's trajectories with this setting."""
    return dataclasses.replace(config, **setting._asdict(), nfe=nfe)


def cheapest(estimates: Iterable[Estimate], limit: float) -> Estimate | None:
    """The estimate of least cost, among these of least upper error, whose upper end is at most `limit`."""
    good = [e for e in estimates if e.high <= limit]
    return min(good, key=lambda e: (e.cost, e.high)) if good else None


def best(estimates: Iterable[Estimate]) -> Estimate:
    """The one of least upper error. Raises FloatingPointError where none is finite."""
    found = min(estimates, key=lambda e: e.high)
    if not math.isfinite(found.high):
        raise FloatingPointError("the teacher's trajectories are not finite with any solver")
    return found


def choose(ends: Endpoints, candidates: list[tuple[Solver, int]], limit: float, whole: bool) -> tuple[list, Estimate]:
    """Estimates from the cheapest on, up to the first cost at which one serves (all if `whole`), and the choice.

    Where no candidate stays below the limit the choice is the one of least upper error.
    """
    estimates: list[Estimate] = []
    ranked = sorted(candidates, key=lambda c: (ends.cost(*c), c[1]))
    for _, group in itertools.groupby(ranked, key=lambda c: ends.cost(*c)):
        estimates += [ends.estimate(*candidate) for candidate in group]
        if not whole and cheapest(estimates, limit):
            break
    return estimates, cheapest(estimates, limit) or best(estimates)


def calls(candidates: Iterable[tuple[Solver, int]]) -> int:
    """Network calls a trajectory of the whole table: each setting at N, 2N, 4N, what is shared once."""
    return sum(nfe for _, nfe in {(setting, nfe * k) for setting, nfe in candidates for k in (1, 2, 4)})


def calls_along(candidates: Iterable[tuple[Solver, int]], count: int) -> int:
    """The same of checking targets at the nodes of each, as of all `count` trajectories."""
    nodes = lambda setting, nfe: nfe // (2 if setting.solver == "heun" else 1)
    checks = lambda n: FINER * sum(n - i for i in checked(n))
    return sum(nfe + checks(nodes(setting, nfe)) for setting, nfe in candidates) * min(ALONG, count) // count
