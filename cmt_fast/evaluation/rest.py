"""Each objective where its answer is known: on a Gaussian mixture it is at rest at the closed form, and nowhere else.

The network is a known function plus theta . phi, phi a few smooth features. With one copy of theta a row, the gradient of
each row's loss is read off at once, and "zero" is judged against its own spread. At theta = 0 the known function is the
answer (the denoiser, the velocity, the flow map); theta = 1 is no answer. An objective is at rest where the largest component
of the mean gradient is within four of its standard errors and beyond ten at theta = 1, or, where rows have no noise, a
hundredth of that at theta = 1:
what is left then is the error of a teacher's step or of a difference quotient. All in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cmt_kernels import Dual
from cmt_kernels.dual import value
from torch import Tensor

from cmt_fast.config.schema import (
    AlphaFlow,
    Ayf,
    CmtCm,
    CmtMf,
    Denoise,
    Drift,
    Ecd,
    Ect,
    Flow,
    Gmm,
    IMeanFlow,
    Imm,
    Lagrangian,
    MeanFlow,
    Scd,
    Sct,
    Semigroup,
    Shortcut,
)
from cmt_fast.data.gmm import Exact, load
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.rng import Random
from cmt_fast.evaluation import theory
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext, Points, sets

MIXTURE = Gmm(n=20000)
VE, LINEAR = ProbabilityPath("ve"), ProbabilityPath("linear")
OFF = 1.0  # a theta that is not the answer
ERRORS, SEEN = 4.0, 10.0  # standard errors within which a gradient is none, and beyond which it is one
SHARE = 0.01  # of the gradient at theta = 1, within which one without noise is none


# ------------------------------------------------------------------------------------------ the known functions


def consistency(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
    """Psi_{t->.002}(x), each row from its own t."""
    return theory.solve(Exact(MIXTURE, VE), x, t, 300)


def flow_map(z: Tensor, t: Tensor, r: Tensor, steps: int = 24) -> Tensor:
    """The linear path's ODE from t to r, each row its own, by Runge and Kutta's fourth order."""
    v, h = Exact(MIXTURE, LINEAR), (r - t) / steps
    for i in range(steps):
        at = t + i * h
        k1 = v(z, at)
        k2 = v(z + column(h / 2, z) * k1, at + h / 2)
        k3 = v(z + column(h / 2, z) * k2, at + h / 2)
        k4 = v(z + column(h, z) * k3, at + h)
        z = z + column(h / 6, z) * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


def average_velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u(z, r, t) = (z - Psi_{t->r}(z)) / (t - r); the velocity where r = t."""
    span = column(t - r, z)
    return torch.where(span > 0, (z - flow_map(z, t, r)) / span.clamp(min=1e-12), Exact(MIXTURE, LINEAR)(z, t))


def phi(x: Tensor, t: Tensor, r: Tensor | None) -> Tensor:
    """Three smooth features of size one. (B, 3)."""
    y, s = x / column(1 + t, x), t / (1 + t) if r is None else t - r / 2
    return torch.stack((torch.cos(3 * s), torch.cos(2 * y[:, 0] + s), torch.sin(2 * y[:, 1] - 2 * s)), dim=1)


class Net:
    """known(x, t, r) + theta . phi(x, t, r), theta (B, 3, 2); the tangent of a Dual call by central difference."""

    def __init__(self, known: Callable, rows: int, theta: float, h: float = 1e-4) -> None:
        self.known, self.h = known, h
        self.theta = torch.full((rows, 3, 2), theta, dtype=torch.float64, requires_grad=True)

    def value(self, x: Tensor, t: Tensor, r: Tensor | None) -> Tensor:
        with torch.no_grad():
            base = self.known(x, t, r)
        return base + torch.einsum("bf,bfd->bd", phi(x, t, r), self.theta[: len(x)])

    def __call__(self, x: Any, t: Any, r: Any = None, labels: Any = None, drop: Any = None) -> Any:
        given = (x, t, r)
        plain = tuple(a if a is None else value(a) for a in given)
        dots = [a.tangent if isinstance(a, Dual) else None for a in given]
        if all(d is None for d in dots):
            return self.value(*plain)
        k = next(len(d) for d in dots if d is not None)
        rate = torch.stack([d.abs() for d in dots[1:] if d is not None]).amax(0)  # tangents on "ve" are as long as 80
        scale = self.h / rate  # a step of h in the times themselves
        moved = lambda a, d, s: a if a is None else a[:k] if d is None else a[:k] + column(s * scale, a) * d
        with torch.no_grad():
            ahead, behind = (self.value(*(moved(a, d, s) for a, d in zip(plain, dots))) for s in (1, -1))
        return Dual(self.value(*plain), (ahead - behind) / column(2 * scale, plain[0]))


def gradients(
    kind: str, known: Callable, drawn: Any, config: Any, world: LossContext, theta: float = 0.0, make: Callable = Net
) -> Tensor:
    """Gradient of each row's loss in its own theta. make: of the network. (B, 6)."""
    rows = len(drawn[0])
    net = make(known, rows, theta)
    loss, _ = OBJECTIVES[kind].function(net, drawn, config, world)
    assert loss.shape == (rows,)
    return torch.autograd.grad(loss.sum(), net.theta)[0].flatten(1)


def in_sets(
    kind: str, known: Callable, config: Any, path: ProbabilityPath, theta: float = 0.0, n: int = MIXTURE.n
) -> Tensor:
    """Gradient of each set's loss in one theta of all its rows, of a loss over sets of `config.group`. (sets, 6)."""
    return sets.gathered(gradients(kind, known, batch(n), config, world(path), theta), config.group).mean(1)


def errors(g: Tensor) -> float:
    """The largest component of the mean gradient, in standard errors."""
    return float((g.mean(0) / (g.std(0) / math.sqrt(len(g)))).abs().max())


def size(g: Tensor) -> float:
    """The norm of the mean gradient."""
    return float(g.mean(0).norm())


# ------------------------------------------------------------------------------------------ what is drawn


@functools.cache
def batch(n: int = MIXTURE.n) -> Batch:
    """The first n rows of the mixture, float64."""
    x_0 = load(MIXTURE).x.double()[:n]
    return Batch(x_0, None, torch.arange(n), None)


@functools.cache
def ve_points(n: int) -> Points:
    """Points of exact trajectories on "ve", each with where it ends."""
    random = Random(0, 0, 1)
    t = torch.exp(2.0 * random.gauss(rng.TIME, torch.arange(n)).double()).clamp(0.01, 80)
    x, _ = VE.point(batch(n).x_0, t, random.key(rng.NOISE), torch.arange(n))
    return Points(x, t, consistency(x, t), torch.full_like(t, theory.T_MIN), None, None)


@functools.cache
def linear_points(n: int) -> Points:
    """Two points of each of n exact trajectories on "linear"."""
    random, ids = Random(0, 0, 1), torch.arange(n)
    r, t = torch.stack([random.uniform(s, ids).double() for s in (rng.TIME, rng.TIME_R)]).sort(0).values
    z, _ = LINEAR.point(batch(n).x_0, t, random.key(rng.NOISE), ids)
    return Points(z, t, flow_map(z, t, r), r, None, None)


def world(path: ProbabilityPath, teacher: Any = None, **more: Any) -> LossContext:
    """What a step draws by; more: progress, nimg."""
    return LossContext(path, Random(0, 0, 0), teacher, **more)


# ------------------------------------------------------------------------------------------ objectives at rest


class Case(NamedTuple):
    """An objective, how it is set here (what makes rows weigh by their own noise is off), and its answer.

    teacher: whether the exact network teaches it; n: rows; gradients: theta -> (B, m), of losses over sets of rows, whose
    network has another form; step: progress and images of the step.
    """

    config: Any
    known: Callable
    path: ProbabilityPath
    teacher: bool = False
    n: int = MIXTURE.n
    gradients: Callable[[float], Tensor] | None = None
    step: dict[str, Any] = {}


class Rest(NamedTuple):
    """The mean gradient's norm at the answer and at theta = 1; both in standard errors of its largest component."""

    answer: float
    answer_errors: float
    off: float
    off_errors: float

    @property
    def holds(self) -> bool:
        """At rest at the answer, and only there."""
        noisy = self.answer_errors < ERRORS and self.off_errors > SEEN
        return noisy or self.answer < SHARE * self.off


CASES = {
    "denoise": Case(Denoise(), Exact(MIXTURE, VE), VE),
    "flow": Case(Flow(), Exact(MIXTURE, LINEAR), LINEAR),
    "cmt_cm": Case(CmtCm(distance="squared_l2"), consistency, VE, n=2000),
    "cmt_mf": Case(CmtMf(), average_velocity, LINEAR, n=2000),
    "ect": Case(Ect(q=4096, distance="squared_l2"), consistency, VE),
    "ecd": Case(Ecd(q=16, k=0, distance="squared_l2"), consistency, VE, teacher=True, n=3000),
    # p = 0: for p > 0 a row's weight depends on its residual, which moves the point of rest
    "meanflow": Case(MeanFlow(ratio=0.5, p=0.0), average_velocity, LINEAR),
    "imeanflow": Case(IMeanFlow(p=0.0), average_velocity, LINEAR),
    # without normalisation, which weighs a row by its own noise; narrow in ln t, as weights of far times are noise
    "sct": Case(Sct(c=None, mean=-0.4, std=0.8), consistency, VE, n=6000),
    "scd": Case(Scd(), consistency, VE, teacher=True, n=2000),
    # the whole derivative: less of it moves the point of rest towards straight lines
    "ayf": Case(Ayf(warmup=0.0, most=1.0), average_velocity, LINEAR, teacher=True, n=2000),
    # an equation for the map beside flow matching, whose rows alone have noise
    "lagrangian": Case(Lagrangian(p=0.0), average_velocity, LINEAR, n=2000),
    "semigroup": Case(Semigroup(p=0.0), average_velocity, LINEAR, n=2000),
    "shortcut": Case(Shortcut(), average_velocity, LINEAR, n=2000),
    "alphaflow": Case(AlphaFlow(p=0.0), average_velocity, LINEAR, n=6000, step={"progress": 1.0}),
    # without a row's own target, whose pull has a mean; of a decrement of eta that is wide beside the noise of 16 samples
    "imm": (of_imm := Case(Imm(group=16, k=8, diagonal=False), average_velocity, LINEAR))._replace(
        gradients=lambda theta: in_sets("imm", average_velocity, of_imm.config, LINEAR, theta)
    ),
    "drift": (of_drift := Case(Drift(), average_velocity, LINEAR, n=6400))._replace(
        gradients=lambda theta: in_sets("drift", average_velocity, of_drift.config, LINEAR, theta, of_drift.n)
    ),
}


def gradients_of(kind: str, known: Callable | None = None, theta: float = 0.0) -> Tensor:
    """Of an objective's case, at another function than its answer if one is given. (B, m)."""
    case = CASES[kind]
    if case.gradients:
        return case.gradients(theta)
    drawn: Any = batch(case.n)
    if OBJECTIVES[kind].draws == "trajectories":
        drawn = (ve_points if case.path is VE else linear_points)(case.n)
    context = world(case.path, Exact(MIXTURE, case.path) if case.teacher else None, **case.step)
    return gradients(kind, known or case.known, drawn, case.config, context, theta)


def measure(kind: str) -> Rest:
    """An objective at its answer and at theta = 1."""
    at, off = gradients_of(kind), gradients_of(kind, theta=OFF)
    return Rest(size(at), errors(at) if size(at) else 0.0, size(off), errors(off))
