"""Flow maps by equation: rows with r < t are at rest at any velocity's map, those with r = t say whose; laws, schedules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import AlphaFlow, Gmm, Lagrangian, MeanFlow, Semigroup, Shortcut
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion.paths import column
from cmt_fast.evaluation import rest
from cmt_fast.evaluation.rest import LINEAR, MIXTURE, OFF, average_velocity, batch, errors, gradients, size, world
from cmt_fast.objectives import (
    OBJECTIVES,
    Batch,
    StageContext,
    alphaflow,
    check_steps,
    maps,
    meanflow,
    semigroup,
    shortcut,
)
from cmt_fast.objectives.counting import work
from cmt_fast.run.resolved import resolve
from cmt_fast.run.validation import check
from tests.fixtures.tiny import tiny
from tests.objectives import peers

VELOCITY = Exact(MIXTURE, LINEAR)
STAGE = StageContext(LINEAR)
ROWS = {
    "lagrangian, own": Lagrangian(ratio=1.0, p=0.0),
    "lagrangian, taught": Lagrangian(ratio=1.0, p=0.0, velocity="teacher"),
    "semigroup, anywhere": Semigroup(ratio=1.0, p=0.0),
    "semigroup, middle": Semigroup(ratio=1.0, p=0.0, split="middle"),
}


def bias(config: Any, known: Callable, theta: float = 0.0, n: int = 250) -> Tensor:
    """The gradient of each row in its theta. (n, 6)."""
    return gradients(config.kind, known, batch(n), config, world(LINEAR, VELOCITY), theta)


@pytest.fixture(scope="module")
def other() -> Callable:
    """The flow map of another velocity, that of wider Gaussians."""
    wide = Exact(Gmm(n=MIXTURE.n, std=2 * MIXTURE.std), LINEAR)

    def known(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rest, "Exact", lambda *_: wide)
            return average_velocity(z, t, r)

    return known


# ------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("case", ROWS)
def test_rows_with_r_below_t_are_at_rest_at_the_map_and_not_at_the_velocity(case: str) -> None:
    config = ROWS[case]
    at, straight, off = (size(bias(config, *a)) for a in ((average_velocity,), (VELOCITY,), (average_velocity, OFF)))
    assert at < 1e-6 < 1e-2 < straight < off


@pytest.mark.parametrize("case", ROWS)
def test_rows_with_r_equal_t_say_whose_map_it_is(case: str, other: Callable) -> None:
    """Without them the map of another velocity is at rest too, unless a teacher says where jumps end."""
    taught = case == "lagrangian, taught"
    assert (size(bias(ROWS[case], other)) > 0.1) == taught
    instant = dataclasses.replace(ROWS[case], ratio=0.0, velocity="teacher")
    assert size(bias(instant, other)) > 0.1 and size(bias(instant, average_velocity)) == 0


def test_shortcuts_are_at_rest_but_for_the_shortest() -> None:
    """Two Euler steps of 1/N make the shortest, at twice that length; the exact map misses them by order 1/N, and no others."""
    found = {}
    for steps in (32, 128):
        config = Shortcut(ratio=1.0, grid=steps)
        drawn = shortcut.draw(batch(800), config, world(LINEAR))
        short, g = drawn.t - drawn.r < 3 / steps, bias(config, average_velocity, n=800)
        assert 50 < int(short.sum()) < 400 and size(g[~short]) < 1e-6
        found[steps] = size(g[short])
    assert found[32] == pytest.approx(4 * found[128], rel=0.25) and found[128] > 1e-3


def test_alphaflow_goes_from_straight_lines_to_meanflow(monkeypatch) -> None:
    """At alpha 1 straight lines are at rest and the map is not. Then the gradient is alpha^2 (the residual, the factor) of
    MeanFlow's, but for a bias that falls as alpha; at 0 the loss is MeanFlow's to the bit."""
    config = AlphaFlow(ratio=1.0, p=0.0)

    def grad(alpha: float, known: Callable = average_velocity, n: int = 1000) -> Tensor:
        monkeypatch.setattr(alphaflow, "schedule", lambda *_: alpha)
        return bias(config, known, n=n)

    assert errors(grad(1.0, VELOCITY, 4000)) < 4 and errors(grad(1.0) - grad(1.0, VELOCITY)) > 10
    limit = grad(0.0)
    apart = [float((grad(a) / a**2 - limit).mean(0).norm()) for a in (0.2, 0.1)]
    assert apart[0] / apart[1] == pytest.approx(2, abs=0.3)
    monkeypatch.undo()
    drawn = alphaflow.draw(batch(50), AlphaFlow(), world(LINEAR, progress=1.0))
    net = peers.network("linear")
    of_meanflow, _ = meanflow.loss_meanflow(net, drawn.pair, MeanFlow(ratio=0.5), STAGE)
    assert torch.equal(alphaflow.loss(net, drawn, AlphaFlow(), STAGE)[0], of_meanflow)


# ------------------------------------------------------------------------------------------ guidance, teachers


class Labelled:
    """u of the small network, with 0.3 added under a label and -0.2 without; calls: rows and r of each."""

    def __init__(self) -> None:
        self.net, self.calls = peers.network("linear"), list[tuple[int, Tensor]]()

    def __call__(self, x: Any, t: Any, r: Any, labels: Any = None, drop: Any = None) -> Any:
        self.calls.append((len(x), r))
        return self.net.plain(x, t, r) + torch.where(drop, -0.2, 0.3)[:, None].double()


def labelled(n: int) -> Batch:
    drop = torch.arange(n) % 3 == 0
    return Batch(batch(n).x_0, torch.arange(n) % 10, torch.arange(n), drop)


@pytest.mark.parametrize("kind", ["lagrangian", "semigroup", "alphaflow"])
def test_rows_with_r_equal_t_are_those_of_meanflow(kind: str) -> None:
    """Guidance inside the target, kept labels and the interval: the same loss to the bit where no row has r < t."""
    keys = {"ratio": 0.0, "omega": 1.7, "kappa": 0.4, "guide_t_max": 0.8}
    config = {"lagrangian": Lagrangian, "semigroup": Semigroup, "alphaflow": AlphaFlow}[kind](**keys)
    drawn = OBJECTIVES[kind].draw(labelled(30), config, world(LINEAR, progress=0.5))
    loss, _ = OBJECTIVES[kind].loss(Labelled(), drawn, config, STAGE)
    keys["p"] = config.p
    want, _ = meanflow.loss_meanflow(Labelled(), getattr(drawn, "pair", drawn), MeanFlow(**keys), STAGE)
    plain, _ = OBJECTIVES[kind].loss(Labelled(), drawn, dataclasses.replace(config, omega=1.0, kappa=0.0), STAGE)
    assert torch.equal(loss, want) and not torch.equal(loss, plain)


def test_shortcut_guides_its_shortest_jumps_alone() -> None:
    """There u_null + omega (u - u_null), which here adds (omega - 1) / 2 to the target of rows with a label; asked at r = t."""
    config, batch_ = Shortcut(ratio=1.0, grid=16, clip=None), labelled(90)
    drawn = shortcut.draw(batch_, config, world(LINEAR))
    short = drawn.t - drawn.r == 2 / 16
    plain = shortcut.two_halves(Labelled(), drawn, 90, config)
    net = Labelled()
    guided = shortcut.two_halves(net, drawn, 90, dataclasses.replace(config, omega=1.5))
    more = (guided - plain)[:, 0]
    assert torch.equal(more != 0, short & ~batch_.drop) and bool(short.any()) and not bool(short.all())
    moved = column(drawn.t - drawn.r, drawn.z)[:, 0] / 2  # the second half begins elsewhere
    assert bool(((more - 0.25).abs() < moved + 1e-9)[short & ~batch_.drop].all())
    m = (drawn.t + drawn.r) / 2
    assert torch.equal(net.calls[0][1], torch.where(short, drawn.t, m))
    assert torch.equal(net.calls[2][1], torch.where(short, m, drawn.r)) and len(net.calls) == 4


def test_work_of_flow_maps_by_hand() -> None:
    """Calls without a gradient on the rows with r < t: where a jump ends; two jumps, guided twice; guided on all rows."""
    count = lambda config: tuple(work(config, LINEAR, 64))
    assert count(Lagrangian()) == (1, 0.25, 0.25, 0) and count(Lagrangian(velocity="teacher")) == (1, 0, 0.25, 1)
    assert count(Semigroup()) == (1, 0.5, 0, 0) and count(Semigroup(velocity="teacher")) == (1, 0.5, 0, 0.75)
    assert count(Semigroup(omega=2.0)) == (1, 1.5, 0, 0)
    assert count(Shortcut()) == (1, 0.5, 0, 0) and count(Shortcut(omega=1.5)) == (1, 1, 0, 0)
    beginning, end = AlphaFlow(begin=0.999), AlphaFlow(end=0.001)  # and steps between: a call from where they end
    assert (
        count(beginning) == (1, 0, 0, 0)
        and count(end) == (1, 0, 0.5, 0)
        and count(AlphaFlow(gamma=1.0)) == (1, 0.5, 0, 0)
    )


# ------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_times_are_of_the_law(law: str) -> None:
    """Rows with r = t are one draw, where MeanFlow's are the later of two; of the others both are two draws in order."""
    n, k, config = 20000, 10000, Lagrangian(law=law, mean=-0.4, std=1.0)
    t, r = maps.draw_times(torch.arange(n), k, config, world(LINEAR), torch.float64)
    assert bool((r[:k] < t[:k]).all()) and torch.equal(r[k:], t[k:])
    place = (lambda x: x) if law == "uniform" else lambda x: torch.special.ndtr(torch.logit(x) + 0.4)
    for x, mean, deviation in (
        (place(t[k:]), 1 / 2, 12**-0.5),
        (place(t[:k]), 2 / 3, 18**-0.5),
        (place(r[:k]), 1 / 3, 18**-0.5),
    ):
        assert abs(float(x.mean()) - mean) < 4 * deviation / k**0.5 and abs(float(x.std()) - deviation) < 0.01
    assert maps.draw_times(torch.arange(4), 2, config, world(LINEAR), torch.float32)[0].dtype == torch.float32


def test_a_jump_is_split_between_its_ends() -> None:
    draws = lambda split: semigroup.draw(batch(2000), Semigroup(split=split), world(LINEAR)).h
    h = draws("uniform")
    assert abs(float(h.mean()) - 0.5) < 4 * (1 / 12 / 2000) ** 0.5 and abs(float(h.std()) - 12**-0.5) < 0.01
    t = semigroup.draw(batch(2000), Semigroup(), world(LINEAR)).pair.t
    assert abs(float(torch.corrcoef(torch.stack((h, t)))[0, 1])) < 4 / 2000**0.5
    assert torch.equal(draws("middle"), torch.full((2000,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shortcuts_are_dyadic(dtype: torch.dtype) -> None:
    """d of 1, 1/2, ..., 1/64 in equal shares, from multiples of d to r >= 0; flow matching on the whole grid, 1 included."""
    n, k = 21000, 7000
    t, r = (x.to(dtype) for x in shortcut.draw_times(torch.arange(n), k, Shortcut(), world(LINEAR)))
    d = (t - r)[:k]
    lengths, counts = d.unique(return_counts=True)
    assert lengths.tolist() == [2.0**-j for j in range(6, -1, -1)]
    assert bool(((counts - 1000).abs() < 4 * (1000 * 6 / 7) ** 0.5).all())
    assert torch.equal((t[:k] / d).round() * d, t[:k]) and float(r.min()) == 0 and float(t[:k].max()) == 1
    grid = t[k:] * 128
    assert torch.equal(r[k:], t[k:]) and torch.equal(grid.unique(), torch.arange(1, 129, dtype=dtype))
    quarters = t[:k][d == 0.25].unique()
    assert quarters.tolist() == [0.25, 0.5, 0.75, 1.0]


def test_alpha_falls_as_published() -> None:
    """DiT-B/2: over the whole stage; XL/2: steps 600,000 to 1,000,000 of 1,200,000. It is 0 from where it would be below .005."""
    whole, xl = AlphaFlow(), AlphaFlow(begin=0.5, end=1 / 1.2)
    at = lambda config, *progress: [alphaflow.schedule(p, config) for p in progress]
    assert at(whole, 0.0, 0.28, 0.5, 0.72, 1.0) == [1, 1, 0.5, 0, 0] and at(xl, 0.5, 2 / 3, 0.9) == [
        1,
        pytest.approx(0.5),
        0,
    ]
    edge = 0.5 + math.log(199) / 25  # of sigmoid = .995
    assert at(whole, edge - 1e-6, edge + 1e-6) == [pytest.approx(0.005, rel=1e-4), 0]
    assert at(whole, 1 - edge + 1e-6, 1 - edge - 1e-6) == [pytest.approx(0.995, rel=1e-4), 1]
    falling = at(whole, *(i / 100 for i in range(100)))
    assert falling == sorted(falling, reverse=True)
    forms = [alphaflow.draw(batch(4), whole, world(LINEAR, progress=p)).form for p in (0.1, 0.5, 0.9)]
    assert forms == [alphaflow.FLOW, alphaflow.STEP, alphaflow.TANGENT]


# ------------------------------------------------------------------------------------------ what is refused

ALONE = ["post.anchor=null", "post.trajectories=null"]
REFUSED = [
    ("{kind: shortcut, grid: 100}", [], "post.objective.grid: 100 is no power of 2"),
    ("{kind: shortcut, grid: 1}", [], "post.objective.grid: 1 is no power of 2 from 2 on"),
    ("{kind: shortcut}", ["eval.steps=[1, 3]"], "eval.steps: 3, and shortcut trains no jump of length 1/3; valid are 1, 2, 4,"),
    ("{kind: shortcut, grid: 4}", ["eval.steps=[1, 4]"], "eval.steps: 4, .* valid are 1, 2$"),
    ("{kind: shortcut, ratio: 1}", [], "post.objective.ratio: 1.0 leaves no row with r = t"),
    ("{kind: lagrangian, ratio: 1}", [], "post.objective.ratio: 1.0 leaves no row with r = t"),
    ("{kind: semigroup, ratio: 1, velocity: teacher}", [], "post.objective.ratio: 1.0 leaves no row with r = t"),
    ("{kind: lagrangian, velocity: teacher}", ["post.teacher=null"], "post.teacher: is missing"),
    ("{kind: semigroup, velocity: teacher, omega: 2}", [], "post.objective.omega: 2.0 guides the data's.* post.teacher_guidance"),
    ("{kind: lagrangian, velocity: teacher, kappa: 0.5}", [], "post.objective.kappa: 0.5 guides the data's"),
    ("{kind: alphaflow, begin: 0.5, end: 0.5}", [], "post.objective.end: 0.5 is not above begin, 0.5"),
]  # fmt: skip


@pytest.mark.parametrize("objective, keys, words", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_does_not_go_together_is_one_line(objective: str, keys: list[str], words: str) -> None:
    run = tiny("digits-mf", *ALONE, f"post.objective={objective}", *keys)
    with pytest.raises(ConfigError, match=words):
        check(run, (1, 8, 8), 10)


def test_a_share_of_rows_that_is_none_is_not_trained() -> None:
    """A run of before that was trained so is read all the same."""
    run = tiny("digits-mf", *ALONE, "post.objective={kind: meanflow, ratio: 0.01}")
    check(run, (1, 8, 8), 10)
    with pytest.raises(
        ConfigError, match="post.objective.ratio: 0.01 of 32 rows .* is none, and no jump .* take 0.031 or more"
    ):
        resolve(run, "post").grad_accum_steps(1)


def test_the_shelf_of_maps_is_taken() -> None:
    for objective in (
        "{kind: lagrangian, velocity: teacher, ratio: 1}",
        "{kind: shortcut}",
        "{kind: alphaflow, ratio: 1}",
    ):
        check(tiny("digits-mf", *ALONE, f"post.objective={objective}", "eval.steps=[1, 2, 8]"), (1, 8, 8), 10)
    check_steps(Semigroup(), [3])
