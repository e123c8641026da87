"""An objective at work in the plane: a small network of two-dimensional points learns the flow map of a Gaussian mixture.

The teacher is the closed form, so what is learned can be held against the exact map: RMS of f(z) - Psi(z) over starting noises
z, and the sliced Wasserstein distance of one-step samples to fresh data, which is what a loss over sets of rows promises.
The network begins as a diffusion model; then it learns the objective either at once ("pre") or after mid-training ("mid"),
which takes its images from the same budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmt_fast.config.schema import Denoise, Flow, Gmm
from cmt_fast.data.gmm import Exact, load
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import rollout, table
from cmt_fast.evaluation.distances import sliced_wasserstein
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext, Points, mid

MIXTURE, SIGMA_DATA = Gmm(n=20000), 0.75
ROWS, PRE, STEPS, MID_SHARE, LOOKS = 256, 1500, 900, 1 / 3, 12
TEACHER = {"ve": ("dpmpp", 16, 80.0, 0.002), "linear": ("heun", 32, 1.0, 0.0)}
RATE = {"pre": 2e-3, "mid": 1e-3, "post": 3e-4}
STARTS = ("pre", "mid")


class Learned(NamedTuple):
    """What one start came to. ends: (n, 2) the one-step samples of the starting noises at the end of it.

    curve: (student images since pre-training, RMS distance to the exact map, sliced Wasserstein distance to data); prepared: the
    images of mid-training among them.
    """

    ends: Tensor
    curve: list[tuple[int, float, float]]
    prepared: int = 0


class Scene(NamedTuple):
    """What a picture of an objective shows; positions are x / (1 + t) on "ve", so that noise and data fit on one page.

    paths: (nodes, m, 2) of the exact ODE; starts: (n, 2) noises with exact ends (n, 2); data (n, 2); learned: by start, "before"
    of it what the diffusion model gives in one step.
    """

    kind: str
    paths: Tensor
    starts: Tensor
    exact: Tensor
    data: Tensor
    before: Tensor
    learned: dict[str, Learned]


class World:
    """A path, its exact teacher's trajectories, starting noises with their exact ends, and data."""

    def __init__(self, name: str, seed: int = 0, n: int = 1500) -> None:
        self.path, self.seed = ProbabilityPath(name, SIGMA_DATA), seed
        self.teacher = Exact(MIXTURE, self.path)
        solver, nfe, self.t_max, t_min = TEACHER[name]
        self.plan = table(self.path, solver, nfe, self.t_max, t_min)
        self.rows = load(MIXTURE).x
        random, ids = Random(seed, 0, 0), torch.arange(n)
        self.noise = random.normal(rng.START, ids, (2,)) * (self.t_max if name == "ve" else 1.0)
        self.exact = self.teacher.flow_map(self.noise.double(), self.t_max, t_min).float()
        self.fresh = self.rows[-4000:]
        many = random.normal(rng.SAMPLE, torch.arange(8192), (2,)) * (self.t_max if name == "ve" else 1.0)
        self.nodes = rollout(self.teacher, self.path, self.plan, many)  # (nodes, 8192, 2)

    def one_step(self, net: Callable, noise: Tensor) -> Tensor:
        """Samples of one call. (n, 2)."""
        t = torch.full((len(noise),), self.t_max)
        with torch.no_grad():
            if self.path.name == "ve":
                return net(noise, t)
            return noise - net(noise, t, torch.zeros_like(t))

    def look(self, net: Callable) -> tuple[Tensor, float, float]:
        """One-step samples, their RMS distance to the exact ends, and to fresh data."""
        ends = self.one_step(net, self.noise)
        rms = float((ends - self.exact).square().sum(1).mean().sqrt())
        return ends, rms, sliced_wasserstein(ends, self.fresh)

    def points(self, random: Random, ids: Tensor, asked: str) -> Points:
        """Rows of trajectories, two nodes each, of those that are asked about."""
        i, j = mid.pairs(self.plan.times, "end" if self.path.name == "ve" else asked)
        pick, which = random.integers(rng.PAIR, ids, len(i)), random.integers(rng.DATA, ids, self.nodes.shape[1])
        times = torch.tensor(self.plan.times, dtype=torch.float32)
        i, j = i[pick], j[pick]
        return Points(self.nodes[i, which], times[i], self.nodes[j, which], times[j], None, None, ids)

    def rows_of(self, random: Random, ids: Tensor) -> Batch:
        """Rows of data without labels."""
        return Batch(self.rows[random.integers(rng.DATA, ids, len(self.rows))], None, ids, None)


class Way(NamedTuple):
    """How a stage learns: its steps, rate (falling to zero), number, and of trajectories which pairs of nodes are asked about."""

    steps: int
    rate: float
    stage: int
    asked: str = "any"


def learn(
    world: World, net: nn.Module, objective: Any, way: Way, look: Callable[[int], None] = lambda images: None
) -> None:
    """Train `net` on an objective by Adam; look(images) is called LOOKS times on the way."""
    spec, (steps, rate, stage, asked) = OBJECTIVES[objective.kind], way
    optimizer = torch.optim.Adam(net.parameters(), rate, betas=(0.9, 0.99))
    ids = torch.arange(ROWS)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        random = Random(world.seed, stage, step)
        context = LossContext(world.path, random, world.teacher, step / steps, nimg=step * ROWS)
        trajectories = spec.draws == "trajectories"
        drawn = world.points(random, ids, asked) if trajectories else world.rows_of(random, ids)
        loss, _ = spec.function(net, drawn, objective, context)
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps:
            look((step + 1) * ROWS)


def diffusion_model(world: World, net: nn.Module, steps: int = PRE) -> nn.Module:
    """The network, trained as a diffusion model of the mixture."""
    objective = Denoise(mean=-0.8, std=1.4) if world.path.name == "ve" else Flow()
    learn(world, net, objective, Way(steps, RATE["pre"], 1))
    return net


def scene(world: World, pre: nn.Module, objective: Any, steps: int = STEPS) -> Scene:
    """An objective from the diffusion model `pre` and from mid-training, `steps` in all for either."""
    learned, spec = {}, OBJECTIVES[objective.kind]
    asked = objective.asks if objective.asks in ("end", "halves") else "any"
    for start in STARTS:
        net, curve, spent = copy.deepcopy(pre), [(0, *world.look(pre)[1:])], 0
        saw = lambda images: curve.append((spent + images, *world.look(net)[1:]))  # noqa: B023
        prepared = start == "mid" and spec.draws == "data" and objective.asks != "instant"
        if start == "mid" and not prepared:
            continue
        if prepared:
            first, target = round(MID_SHARE * steps), mid.prepares(objective, world.path.name)
            learn(world, net, target, Way(first, RATE["mid"], 2, asked), saw)
            spent = first * ROWS
        rate = RATE["mid"] if spec.draws == "trajectories" else RATE["post"]
        learn(world, net, objective, Way(steps - spent // ROWS, rate, 3, asked), saw)
        learned[start] = Learned(world.one_step(net, world.noise), curve, spent)
    shown = world.nodes[:, :60] / column(1 + torch.tensor(world.plan.times), world.nodes[:, :60])
    scale = 1 + world.t_max if world.path.name == "ve" else 1.0
    paths = shown if world.path.name == "ve" else world.nodes[:, :60]
    return Scene(
        objective.kind,
        paths,
        world.noise / scale,
        world.exact,
        world.fresh[:1500],
        world.one_step(pre, world.noise),
        learned,
    )
