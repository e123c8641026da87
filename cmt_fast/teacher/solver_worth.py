"""What teacher calls are worth: the solver of the least bound on the bias of post-training's gradient, at a budget of forwards.

The theorem (CMT, arXiv 2509.24526, sec. 5) is about the bias of the consistency loss's gradient at the network f that
post-training begins from, with J = df/dtheta and Psi the exact flow map:

    B = ||grad L_CM - grad L_oracle||^2 = ||2 E[J^T (f(x_r, r) - Psi(x_t))]||^2  <=  4 L_J^2 E|f(x_r, r) - Psi(x_t)|^2
      <=  C (epsilon + (solver error)^2 + Lip^2 E|x_r - Psi_{t->r}(x_t)|^2)

from a mid-trained start, and never below a constant from a diffusion model. The last part is of post-training's own step. The
first two are mid-training's: epsilon, how far its student is from the map that its targets describe, and how far these are from
Psi. With F forwards for the stage, N calls a trajectory of which n points are drawn, and w forwards for a student image,

    images(N) = F / (w + N / n),      bound(N) = margin^2 epsilon(images(N)) + E_i |x_N - Psi_{t_i}(x_i)|^2.

So fewer calls buy images, which lower epsilon, and more calls lower the error of the targets; `choose` takes the least sum. Two
things of it are not in the theorem, and on the world whose bias is known (`python -m bench worth`) both are needed:

* The error is that of the targets at all nodes, and not that of the endpoint from t = T: errors of single steps may cancel on
  the way from noise (order 2 at six calls there) and do not from the middle, where the target is the same x_N. Post-training
  asks at all times.
* epsilon counts by margin^2, a sixteenth: where the loss is at rest the student's error is orthogonal to J and drops out of B,
  the solver's does not (see solver_error). The margin is that of the rule without a budget, set on digits and not on that
  world. With 1 the sum is the theorem's own.

epsilon(images) is measured: the two pilots of `nfe: auto` are two points of it, and a line through them in logarithms is the
law. Where there are no pilots (a student that was trained already, an epsilon that was typed) there is no law and nothing to
weigh: the choice is then the one without a budget, and only the length follows from it. The record says which.

What is not in the budget: the search itself, whose calls are told beside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cmt_fast.teacher import solver_record
from cmt_fast.teacher.solver_error import Along, Endpoints, Estimate, Solver

Candidate = tuple[Solver, int]


class Law(NamedTuple):
    """How the student's one-step error falls: mean squares per dimension, of the shorter pilot and of the longer.

    epsilon(n) = errors[1] (errors[1] / errors[0])^(log(n / images[1]) / log(images[1] / images[0])), and no rise.
    """

    images: tuple[int, int]
    errors: tuple[float, float]

    @property
    def exponent(self) -> float:
        """p of epsilon ~ images^-p, at least 0."""
        return max(0.0, math.log(self.errors[0] / self.errors[1]) / math.log(self.images[1] / self.images[0]))

    def at(self, images: int) -> float:
        """epsilon after so many images."""
        return self.errors[1] * (self.images[1] / images) ** self.exponent


class Weighed(NamedTuple):
    """A candidate: teacher calls for a row, the images that it leaves, epsilon after these, and what its targets miss.

    estimate: of its endpoint, which the bound has no use for: only of what was chosen, unless all was asked for.
    """

    setting: Solver
    nfe: int
    cost: float
    images: int
    epsilon: float
    along: Along
    bound: float
    estimate: Estimate | None = None


class Choice(NamedTuple):
    """What was weighed, from the cheapest on; the least bound; and the candidates that no measurement could have made it."""

    weighed: list[Weighed]
    best: Weighed
    passed: list[Candidate]


@dataclasses.dataclass(frozen=True)
class Budget:
    """affords: images that a candidate leaves; law: of the student; weight: of its epsilon beside the targets' error squared."""

    affords: Callable[[Solver, int], int]
    law: Law
    weight: float

    def bound(self, epsilon: float, along: float) -> float:
        """The sum: what is left of the bound on the bias, up to the constant that all candidates share."""
        return self.weight * epsilon + along**2


def choose(
    ends: Endpoints, candidates: Sequence[Candidate], budget: Budget, fine: Solver, whole: bool = False
) -> Choice:
    """The candidate of the least bound, by the upper end of its targets' error. fine: what Psi is computed by, from each node.

    Candidates are weighed from the cheapest on. Dearer ones leave fewer images, so where the student's share alone is past the
    least bound none of them can be below it, and none is measured (all if `whole`).

    Raises FloatingPointError where none is finite.
    """
    weighed: list[Weighed] = []
    least, passed = math.inf, list[Candidate]()
    for setting, nfe in sorted(candidates, key=lambda c: (ends.cost(*c), c[1])):
        images = budget.affords(setting, nfe)
        if images <= 0:
            passed.append((setting, nfe))
            continue
        epsilon = budget.law.at(images)
        if not whole and budget.bound(epsilon, 0.0) >= least:
            passed.append((setting, nfe))
            continue
        along = ends.along(setting, nfe, fine)
        bound = budget.bound(epsilon, along.high)
        weighed.append(Weighed(setting, nfe, ends.cost(setting, nfe), images, epsilon, along, bound))
        least = min(least, bound)
    if not math.isfinite(least):
        raise FloatingPointError("the teacher's trajectories are not finite with any solver")
    best = min(range(len(weighed)), key=lambda i: weighed[i].bound)
    for i, w in enumerate(weighed):
        if whole or i == best:
            weighed[i] = w._replace(estimate=ends.estimate(w.setting, w.nfe))
    return Choice(weighed, weighed[best], passed)


def grounds(found: Choice, budget: Budget) -> dict[str, Any]:
    """What a record keeps beside its rows."""
    law = budget.law
    return {
        "rule": "bias",
        "why": f"epsilon falls as images^-{law.exponent:.2f} between pilots of {law.images[0]:,} and {law.images[1]:,} images",
        "images": found.best.images,
        "weight": budget.weight,
        "epsilon": found.best.epsilon,
        "along": found.best.along.high,
        "bound": found.best.bound,
        "passed": [{**setting._asdict(), "nfe": nfe} for setting, nfe in found.passed],
    }


def row_of(w: Weighed) -> dict[str, Any]:
    """As a record has it, that of an estimate and more; infinite numbers are null, and so is what was not estimated."""
    unknown = {**w.setting._asdict(), "nfe": w.nfe, "cost": w.cost, **dict.fromkeys(solver_record.ESTIMATED)}
    own = solver_record.rows_of([w.estimate])[0] if w.estimate else unknown
    more = {
        "images": w.images,
        "epsilon": w.epsilon,
        "along": w.along.error,
        "along_high": w.along.high,
        "bound": w.bound,
    }
    return {**own, **{key: v if math.isfinite(v) else None for key, v in more.items()}}
