"""`python -m bench worth`: the solver that a budget of forwards chooses, beside the gradient's bias that each choice really has.

The world of evaluation/theory.py: a Gaussian mixture whose denoiser D and flow map Psi are known. A student f = D + c_out W phi,
phi cosines, begins as a teacher does and is trained on points of the trajectories of every candidate, solver and calls, for as
many images as the budget leaves with it. Then its bias is taken as the theorem has it:

    B = ||2 E[J^T (f(x_r, r) - Psi(x_t))]||^2,   J = c_out phi,   B <= 4 lambda_max(E[J J^T]) E|f(x_r, r) - Psi(x_t)|^2.

The rules see what they see of a run: endpoints by step doubling, targets along the trajectories by a finer solver, two pilots.
None of them sees Psi. Compared are the choice by the bound (teacher/solver_worth.py), the choice of `nfe: auto` without a budget,
the theorem's plain sum with the error of the endpoint, that sum with each of the two changes alone, and one at random, whose bias
is the geometric mean over candidates. All is in float64; a bias is a geometric mean over seeds of training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.results_file import commit
from cmt_fast.config.schema import Trajectories
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import rollout, table
from cmt_fast.evaluation import theory
from cmt_fast.runtime.machine import environment
from cmt_fast.teacher import solver_error, solver_worth
from cmt_fast.teacher.solver_error import Endpoints, Solver
from cmt_fast.train.solver_choice import PILOT, PROBE

BUDGETS = (20_000, 40_000, 80_000, 160_000, 320_000)
NFE, POINTS = (4, 6, 8, 12, 16, 24, 32), 4  # calls that are candidates; points of a trajectory
BATCH, RATE, STUDENT = 64, 0.05, 3  # rows, Adam's rate, forwards for an image
TRAJECTORIES, SAMPLES = 4096, 4000
PATH = ProbabilityPath("ve")
HOW = Trajectories(per_trajectory=POINTS, t_max=theory.T_MAX, t_min=theory.T_MIN)


class Points(NamedTuple):
    """All points of trajectories of a candidate: what W is multiplied by (n, F), and what is left of the target (n, 2)."""

    jacobian: Tensor
    residual: Tensor


class Student:
    """D + c_out W phi; width: how fast its features turn."""

    def __init__(self, features: int, width: float, seed: int = 0) -> None:
        self.features, self.width, self.seed = features, width, seed
        self.net = Exact(theory.MIXTURE, PATH)

    def jacobian(self, x: Tensor, t: Tensor) -> Tensor:
        """df/dW of one coordinate. (n, F)."""
        c_out = t * PATH.sigma_data / torch.sqrt(t**2 + PATH.sigma_data**2)
        field = theory.cosines(x, t, PATH.sigma_data, self.features, self.seed, self.width)
        return column(c_out, x) * field * math.sqrt(2 / self.features)

    def points(self, setting: Solver, nfe: int, trajectories: int) -> Points:
        """Of a candidate's trajectories."""
        x = theory.T_MAX * Random(7, 0, 0).normal(rng.START, torch.arange(trajectories), (2,)).double()
        plan = table(PATH, setting.solver, nfe, theory.T_MAX, theory.T_MIN, setting.order)
        nodes = rollout(self.net, PATH, plan, x)
        t = torch.tensor(plan.times[:-1], dtype=x.dtype).repeat_interleave(trajectories)
        at, end = nodes[:-1].flatten(0, 1), nodes[-1].repeat(len(plan.times) - 1, 1)
        return Points(self.jacobian(at, t), end - self.net(at, t))

    def trained(self, on: Points, images: int, seed: int) -> Tensor:
        """W (F, 2) after so many images by Adam, its rate falling to nothing."""
        steps, g = max(1, images // BATCH), torch.Generator().manual_seed(seed)
        w = torch.zeros(on.jacobian.shape[1], 2, dtype=torch.float64)
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for s in range(1, steps + 1):
            rows = torch.randint(0, len(on.residual), (BATCH,), generator=g)
            j = on.jacobian[rows]
            grad = 2 * j.T @ (j @ w - on.residual[rows]) / BATCH
            m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
            w -= RATE * (1 - (s - 1) / steps) * (m / (1 - 0.9**s)) / ((v / (1 - 0.99**s)).sqrt() + 1e-8)
        return w


class Truth:
    """What the world knows and no rule sees: Psi at the points of post-training."""

    def __init__(self, student: Student, samples: int) -> None:
        drawn = theory.draw(samples, 0)
        self.target = theory.psi(student.net, drawn.x_t, drawn.t)
        x_r, r = drawn.data_point(theory.FINE_Q)
        self.at_r, self.start = student.jacobian(x_r, r), student.net(x_r, r)
        self.jacobian = student.jacobian(drawn.x_t, drawn.t)
        self.most = float(torch.linalg.eigvalsh(self.jacobian.T @ self.jacobian / samples)[-1])

    def bias(self, w: Tensor) -> dict[str, float]:
        """B of a student, E|e|^2, and what the theorem says that B is at most."""
        e = self.start + self.at_r @ w - self.target
        bias, square = float((2 * self.jacobian.T @ e / len(e)).square().sum()), float(e.square().sum(1).mean())
        return {"bias": bias, "square": square, "most": 4 * self.most * square}


class World:
    """A student, its candidates with their points, and what is measured of them without Psi."""

    def __init__(self, student: Student, nfes: tuple[int, ...], trajectories: int, samples: int, count: int) -> None:
        self.student, self.truth = student, Truth(student, samples)
        x = solver_error.starts(PATH, HOW, (2,), 0, 0, torch.device("cpu"), count)[0].double()
        self.ends = Endpoints(student.net, PATH, x, None, HOW)
        self.candidates = [(s, n) for n in nfes for s in solver_error.settings("ve", HOW) if s.solver == "dpmpp"]
        self.points = {c: student.points(*c, trajectories) for c in self.candidates}
        probed = [c for c in self.candidates if c[1] == min(nfes, key=lambda n: abs(n - PROBE))]
        self.sure = solver_error.best(self.ends.estimate(*c) for c in probed)
        self.limit = self.ends.limit(self.sure.setting, self.sure.nfe)[0]

    def affords(self, budget: int, setting: Solver, nfe: int) -> int:
        """Images of whole batches."""
        return int(budget / (STUDENT + self.ends.cost(setting, nfe))) // BATCH * BATCH

    def epsilon(self, w: Tensor) -> float:
        """The one-step error from noise, by the limit that a run would take for Psi: a mean square per dimension."""
        x = self.ends.x
        t = torch.full((len(x),), theory.T_MAX, dtype=x.dtype)
        return float((self.student.net(x, t) + self.student.jacobian(x, t) @ w - self.limit).square().mean())

    def law(self, budget: int) -> solver_worth.Law:
        """Of two pilots as `nfe: auto` takes them."""
        on, whole = (
            self.points[self.sure.setting, self.sure.nfe],
            self.affords(budget, self.sure.setting, self.sure.nfe),
        )
        short = max(1, min(PILOT, whole // BATCH // 8)) * BATCH
        first, second = (self.epsilon(self.student.trained(on, n, 9)) for n in (short, 2 * short))
        return solver_worth.Law((short, 2 * short), (first, second))


def at_budget(world: World, budget: int, seeds: int) -> dict[str, Any]:
    """All candidates at a budget, their bias, and what each rule takes."""
    law = world.law(budget)
    mine = solver_worth.Budget(lambda s, n: world.affords(budget, s, n), law, solver_error.MARGIN**2)
    found = solver_worth.choose(world.ends, world.candidates, mine, world.sure.setting, whole=True)
    rows = {}
    for w in found.weighed:
        on = world.points[w.setting, w.nfe]
        seen = [world.truth.bias(world.student.trained(on, w.images, seed)) for seed in range(seeds)]
        middle = {key: math.exp(sum(math.log(s[key]) for s in seen) / seeds) for key in seen[0]}
        rows[named(w)] = {**solver_worth.row_of(w), **middle}
    settled = world.affords(budget, world.sure.setting, world.sure.nfe)
    limit = solver_error.MARGIN * math.sqrt(law.at(settled))
    by_error = solver_error.choose(world.ends, world.candidates, limit, False)[1]
    least = lambda weight, key: min(rows, key=lambda name: weight * rows[name]["epsilon"] + rows[name][key] ** 2)
    rules = {
        "bound": named(found.best),
        "error": f"{by_error.setting.title()} at {by_error.nfe}",
        "theorem": least(1.0, "error"),
        "ends": least(mine.weight, "error"),
        "whole": least(1.0, "along_high"),
        "best": min(rows, key=lambda name: rows[name]["bias"]),
    }
    bias = [row["bias"] for row in rows.values()]
    return {
        "budget": budget, "exponent": law.exponent, "candidates": rows, "rules": rules,
        "random": math.exp(sum(map(math.log, bias)) / len(bias)),
        "correlation": {"bound": ranks([r["bound"] for r in rows.values()], bias),
                        "error": ranks([r["error"] for r in rows.values()], bias),
                        "theorem": ranks([r["epsilon"] + r["error"] ** 2 for r in rows.values()], bias)},
    }  # fmt: skip


def named(w: solver_worth.Weighed) -> str:
    """A candidate in a word."""
    return f"{w.setting.title()} at {w.nfe}"


def ranks(a: list[float], b: list[float]) -> float:
    """Spearman's correlation."""
    order = [torch.tensor(v, dtype=torch.float64).argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(order))[0, 1])


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seeds", type=int, default=3, help="trainings of every candidate (default: 3)")
    p.add_argument("--json", type=Path, default=Path("bench/results/cpu/gmm-worth.json"))


def run(args: argparse.Namespace) -> int:
    """Both students at every budget; writes the JSON."""
    begin, out = time.process_time(), {}
    for features, width in ((128, 1.0), (256, 2.0)):
        world = World(Student(features, width), NFE, TRAJECTORIES, SAMPLES, solver_error.COUNT)
        found = [at_budget(world, budget, args.seeds) for budget in BUDGETS]
        out[f"{features} features of width {width:g}"] = found
        for f in found:
            best = f["candidates"][f["rules"]["best"]]["bias"]
            told = {rule: f"{name} x{f['candidates'][name]['bias'] / best:.2f}" for rule, name in f["rules"].items()}
            right = {rule: round(v, 2) for rule, v in f["correlation"].items()}
            print(f"{features} at {f['budget']:>7,}: {told}, random x{f['random'] / best:.1f}; ranks {right}")
    about = {"seeds": args.seeds, "commit": commit(), "date": date.today().isoformat(), "environment": environment()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**about, "cpu_s": time.process_time() - begin, "students": out}, indent=1) + "\n")
    print(args.json)
    return 0
