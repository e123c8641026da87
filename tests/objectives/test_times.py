"""Times of the linear path: their law, their shift, and that a network is told the time where its row is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cmt_fast.config import loading
from cmt_fast.config.schema import AlphaFlow, CmtMf, Flow, IMeanFlow, Lagrangian, MeanFlow, Semigroup, Trajectories
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import table
from cmt_fast.evaluation import rest
from cmt_fast.objectives import OBJECTIVES, LossContext, flow, meanflow, times
from cmt_fast.objectives.cmt import cmt_mf
from cmt_fast.teacher.pool import Pool, Prior

LINEAR, RANDOM, IDS = ProbabilityPath("linear"), Random(3, 1, 2), torch.arange(20_000)
CONTEXT = LossContext(LINEAR, RANDOM)
SHIFT = {256: 6.928203230275509, 512: 13.856406460551018}  # sqrt(768 16 16 / 4096) and sqrt(768 32 32 / 4096)


def shifted(t, s: float):
    return s * t / (1 + (s - 1) * t)


@pytest.mark.parametrize("side, pixels", [(16, 256), (32, 512)])
def test_the_shift_is_that_of_the_published_latents(side: int, pixels: int) -> None:
    assert times.dimension_shift((768, side, side)) == SHIFT[pixels]
    assert times.dimension_shift((4, 32, 32)) == 1
    recipe = loading.load("imagenet256-rae")
    set_to = [
        recipe.pre.objective.shift,
        recipe.mid.trajectories.shift,
        recipe.post.objective.shift,
        recipe.sampler.shift,
    ]
    assert set_to == [times.dimension_shift(recipe.data.expects.shape)] * 4


def test_the_law_of_times_before_and_after_the_shift() -> None:
    """Uniform: P(t' < x) = x / (s - (s - 1) x), the shift's inverse; logit-normal: a shift by s adds ln s to the logit."""
    s = SHIFT[256]
    for config, law in (
        (Flow(law="uniform", shift=s), lambda x: x / (s - (s - 1) * x)),
        (Flow(mean=0.0, std=1.0, shift=s), lambda x: 0.5 * math.erfc((math.log(s) - math.log(x / (1 - x))) / 2**0.5)),
    ):
        t = times.drawn(rng.TIME, IDS, config, CONTEXT, torch.float64)
        for x in (0.2, 0.5, 0.8, 0.95):
            assert float((t < x).double().mean()) == pytest.approx(law(x), abs=0.012)
    plain = torch.sigmoid(-0.4 + RANDOM.gauss(rng.TIME, IDS)).double()
    assert torch.equal(times.drawn(rng.TIME, IDS, Flow(), CONTEXT, torch.float64), plain)


def test_points_and_both_times_of_a_row_are_at_the_shifted_times() -> None:
    """z_t = (1 - t) x_0 + t eps with the t that the network is told; the later time of MeanFlow stays the later one."""
    batch, s = rest.batch(256), SHIFT[256]
    for draw, config in ((flow.draw, Flow(shift=s)), (meanflow.draw, MeanFlow(ratio=0.5, law="uniform", shift=s))):
        drawn = draw(batch, config, CONTEXT)
        z, v, t = drawn[0], drawn[1], drawn.t
        torch.testing.assert_close(z, batch.x_0 + t[:, None] * v)
        before = draw(batch, config.__class__(**{**vars(config), "shift": 1.0}), CONTEXT)
        torch.testing.assert_close(t, shifted(before.t, s))
        if config.kind == "meanflow":
            torch.testing.assert_close(drawn.r, shifted(before.r, s))
            assert (drawn.r[:128] < t[:128]).all() and torch.equal(drawn.r[128:], t[128:])


# ---------------------------------------------------------------------------------------------- true labels


@pytest.mark.parametrize("pixels, worst", [(256, 0.45), (512, 0.58)])
def test_published_mid_training_tells_other_times_than_those_of_its_solver(pixels: int, worst: float) -> None:
    """sony/mf-rae: its solver's 16 nodes are a shifted grid from 1 to 0.001 (integrators.py), its labels are linspace(0, 1, 16)
    (transport.py, training_losses_cmt_v2). Ours are the solver's own, and end at 0."""
    u = 1 - np.linspace(0, 1 - 1 / 1000, 16)
    solver, labels = shifted(u, SHIFT[pixels]), np.linspace(1, 0, 16)
    assert abs(labels - solver).max() == pytest.approx(worst, abs=0.005)
    plan = table(LINEAR, "euler", 15, 1.0, 0.0, shift=SHIFT[pixels])
    assert plan.times[0] == 1 and plan.times[-1] == 0 and len(plan.times) == 16
    assert [row.t for row in plan.rows] == list(plan.times[:-1])
    assert max(abs(a - b) for a, b in zip(plan.times[:-1], solver)) < 0.04  # the published grid, but for its end


@pytest.mark.parametrize("field", ["constant", "linear in t"])
def test_targets_are_average_velocities_only_with_true_times(field: str) -> None:
    """On the field v = 1 the average velocity of any two points is 1, on v = 2t it is nearly r + t: the loss of the network that
    knows so is 0, or Euler's error. With the published labels it is not, for the same states."""
    v = {"constant": torch.ones_like, "linear in t": lambda t: 2 * t}[field]
    told = {"constant": lambda t, r: torch.ones_like(t), "linear in t": lambda t, r: r + t}[field]
    asked: list[float] = []

    def teacher(x, t, r=None, labels=None):
        asked.append(float(t[0]))
        return v(t)[:, None].expand_as(x)

    def student(x, t, r, labels, drop):
        return told(t, r)[:, None].expand_as(x)

    config = Trajectories(
        solver="euler", nfe=15, t_max=1.0, t_min=0.0, shift=SHIFT[256], mode="pool", per_trajectory=8, pool_steps=1
    )
    pool = Pool(teacher, LINEAR, config, Prior((2,), 0, 5, 1), 512, torch.device("cpu"))
    points = pool.draw(0, torch.arange(512))
    assert asked == pytest.approx(list(pool.plan.times[:-1])) and len(set(points.t.tolist())) == 15
    loss = lambda p: float(cmt_mf(student, p, CmtMf(), CONTEXT)[0].mean())
    places = torch.tensor(pool.plan.times)
    named = torch.linspace(1, 0, 16)
    label = lambda t: named[(t[:, None] - places).abs().argmin(1)]
    wrong = points._replace(t=label(points.t), r=label(points.r))
    right = loss(points)
    assert right < (1e-9 if field == "constant" else 0.1) and loss(wrong) > 0.5 and loss(wrong) > 10 * right


# ---------------------------------------------------------------------------------------------- a teacher's velocity


def test_meanflow_on_a_teachers_velocity_is_at_rest_at_the_flow_map() -> None:
    """Its regression target has no noise of a row, and the guidance-free teacher's flow map is where it rests."""
    config = MeanFlow(ratio=0.5, p=0.0, velocity="teacher", law="uniform")
    world = rest.world(LINEAR, Exact(rest.MIXTURE, LINEAR))
    at, off = (
        rest.size(rest.gradients("meanflow", rest.average_velocity, rest.batch(1000), config, world, theta))
        for theta in (0.0, rest.OFF)
    )
    assert at < rest.SHARE * off
    noisy = MeanFlow(ratio=0.5, p=0.0, law="uniform")
    spread = rest.gradients("meanflow", rest.average_velocity, rest.batch(1000), noisy, world).std(0).norm()
    taught = rest.gradients("meanflow", rest.average_velocity, rest.batch(1000), config, world).std(0).norm()
    assert taught < 0.05 * spread


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("config", [MeanFlow, IMeanFlow, AlphaFlow], ids=lambda c: c.kind)
def test_with_a_teachers_velocity_the_datas_is_read_nowhere(config, progress: float) -> None:
    world = rest.world(LINEAR, Exact(rest.MIXTURE, LINEAR), progress=progress)
    spec, setting = OBJECTIVES[config.kind], config(ratio=0.5, velocity="teacher")
    drawn = spec.draw(rest.batch(64), setting, world)
    without = lambda pair: pair._replace(v=torch.full_like(pair.v, torch.nan))
    other = drawn._replace(pair=without(drawn.pair)) if hasattr(drawn, "pair") else without(drawn)
    a, b = (spec.loss(rest.Net(rest.average_velocity, 64, 0.5), d, setting, world.stage)[0] for d in (drawn, other))
    assert torch.equal(a, b) and torch.isfinite(a).all()


@pytest.mark.parametrize("config", [Flow, MeanFlow, IMeanFlow, AlphaFlow, Lagrangian, Semigroup], ids=lambda c: c.kind)
def test_every_objective_that_knows_a_shift_takes_it(config) -> None:
    draw = OBJECTIVES[config.kind].draw
    t, before = (getattr(d, "pair", d).t for s in (3.0, 1.0) for d in [draw(rest.batch(64), config(shift=s), CONTEXT)])
    torch.testing.assert_close(t, shifted(before, 3.0))
