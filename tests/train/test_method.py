"""The method, number by number: solver grid, batches of trajectories, objectives and samplers as published."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from cmt_kernels import Dual
from torch import Tensor

from cmt_fast import distributed, paths, rng
from cmt_fast.models import build
from cmt_fast.models.precond import AverageVelocity, Denoiser
from cmt_fast.objectives import Batch, Points, World, cmt, consistency, flow, meanflow
from cmt_fast.paths import Path
from cmt_fast.rng import Random
from cmt_fast.sample import Setting
from cmt_fast.schema import CmtCm, CmtMf, Ecd, Ect, Flow, MeanFlow, Mlp, Sampler, Trajectories
from cmt_fast.solvers import dpmpp_coefficients, guided, sample_consistency, sample_jumps, table, ve_step
from cmt_fast.trajectories import Pool

VE, LINEAR = Path("ve"), Path("linear")
CPU = torch.device("cpu")
SIXTEEN = [
    80,
    41.2535,
    21.2732,
    10.9699,
    5.65685,
    2.91707,
    1.50424,
    0.77569,
    0.4,
    0.20627,
    0.10637,
    0.05485,
    0.02828,
    0.01459,
    0.00752,
    0.00388,
    0.002,
]


def full(n: int, value: float, dtype=torch.float64) -> Tensor:
    return torch.full((n,), value, dtype=dtype)


# ------------------------------------------------------------------------------------------ 1. the solver's grid


def test_grid_and_constants_of_sixteen_calls() -> None:
    plan = table(VE, "dpmpp", 16, 80.0, 0.002)
    assert plan.times == pytest.approx(SIXTEEN, rel=1e-3) and plan.times[7] == pytest.approx(0.77569, abs=5e-6)
    assert plan.times[-1] == 0.002 and plan.nfe == 16 and plan.prediction == "data"
    assert [row.t for row in plan.rows] == list(plan.times[:16])
    rho = plan.times[1] / plan.times[0]
    assert rho == pytest.approx(0.515669, abs=1e-6)
    first, second = (rho, 1 - rho, 0, 0), (rho, 1.5 * (1 - rho), -0.5 * (1 - rho), 0)
    third = (rho, 0.93452, -0.63168, 0.18149)
    for i, row in enumerate(plan.rows):
        expected = {0: first, 1: second, 14: second, 15: first}.get(i, third)
        assert row.coefficients == pytest.approx(expected, abs=1e-5), i


@pytest.mark.parametrize(
    "nfe, order, ladder", [(16, 3, "12" + "3" * 12 + "21"), (4, 3, "1221"), (3, 3, "121"), (5, 2, "12221")]
)
def test_order_ladder(nfe: int, order: int, ladder: str) -> None:
    rows = table(VE, "dpmpp", nfe, 80.0, 0.002, order).rows
    assert "".join(str(sum(c != 0 for c in row.coefficients[1:])) for row in rows) == ladder


def test_linear_table_is_the_same_solver() -> None:
    """A step of DPM-Solver++ on linear flow is VE's in the scaled state x / (1 + sigma); the last, to 0, gives D."""
    t, s = 0.7, 0.45
    for order in (1, 2, 3):
        ve = dpmpp_coefficients(VE, t / (1 - t), s / (1 - s), order, 1.3, 0.8)
        scaled = [ve[0] * (1 - s) / (1 - t), *(c * (1 - s) for c in ve[1:])]
        assert dpmpp_coefficients(LINEAR, t, s, order, 1.3, 0.8) == pytest.approx(scaled)
    assert table(LINEAR, "dpmpp", 8, 1.0, 0.0).rows[-1].coefficients == (0.0, 1.0, 0.0, 0.0)


def test_linear_grid_is_shifted_and_labels_are_true_times() -> None:
    s = 3.0
    plan = table(LINEAR, "euler", 4, 1.0, 0.0, shift=s)
    assert plan.times == pytest.approx([s * u / (1 + (s - 1) * u) for u in (1, 0.75, 0.5, 0.25, 0)])
    assert [row.t for row in plan.rows] == list(plan.times[:-1])


@pytest.mark.parametrize(
    "path, solver, nfe, t_max, t_min, key",
    [
        (VE, "heun", 5, 80, 0.002, "nfe"),
        (VE, "jump", 4, 80, 0.002, "jump"),
        (VE, "dpmpp", 4, 80, 0, "t_min"),
        (VE, "euler", 4, 0.002, 80, "t_min"),
        (LINEAR, "euler", 4, 80, 0.002, "t_max"),
    ],
)
def test_tables_that_do_not_exist(path: Path, solver: str, nfe: int, t_max: float, t_min: float, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        table(path, solver, nfe, t_max, t_min)


# ------------------------------------------------------------------------------------------ 3. trajectories in bulk


def pull(x: Tensor, t: Tensor, r: Tensor | None, labels: Tensor | None, drop: Tensor | None = None) -> Tensor:
    """D = label, or -1 where it is dropped: the solver is exact, x_k = D + (t_k / t_0) (x_T - D)."""
    level = torch.zeros_like(t) if labels is None else labels.to(x.dtype)
    level = level if drop is None else torch.where(drop, -1.0, level)
    return paths.column(level, x).expand_as(x)


def pool(rows: int, teacher=pull, path: Path = VE, classes: int = 10, seed: int = 3, **options) -> Pool:
    config = Trajectories(**{"t_max": 80.0 if path is VE else 1.0, "t_min": 0.002 if path is VE else 0.0} | options)
    return Pool(teacher, path, config, (2, 3), classes, rows, seed, 1, CPU)


def draw(p: Pool, step: int) -> Points:
    return p.draw(step, torch.arange(p.rows))


def test_paper_batch_is_step_major() -> None:
    """128 rows of 16 calls: 8 trajectories, all 16 points each; row 8 k + j is node k of trajectory j."""
    points = draw(pool(128, mode="paper"), 5)
    times = torch.tensor(SIXTEEN, dtype=torch.float32)
    torch.testing.assert_close(points.t, times[:16].repeat_interleave(8), rtol=1e-3, atol=0)
    assert torch.equal(points.r, full(128, 0.002, torch.float32))
    random, ids = Random(3, 1, 5), torch.arange(8)
    noise, labels = 80 * random.normal(rng.START, ids, (2, 3)), random.integers(rng.START_LABEL, ids, 10)
    level = labels.float().repeat(16).view(-1, 1, 1)
    assert torch.equal(points.labels, labels.repeat(16)) and points.drop is None
    exact = lambda t: level + t.view(-1, 1, 1) / 80 * (noise.repeat(16, 1, 1) - level)
    torch.testing.assert_close(points.x, exact(points.t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(points.x_r, exact(points.r), rtol=1e-4, atol=1e-4)
    assert torch.equal(points.x_r.view(16, 8, 2, 3)[0], points.x_r.view(16, 8, 2, 3)[15])
    assert not torch.equal(points.x, draw(pool(128, mode="paper"), 6).x)


@pytest.mark.parametrize("rows, options", [(120, {"mode": "paper"}), (8, {"mode": "paper"}), (20, {"pool_steps": 3})])
def test_batch_that_does_not_divide(rows: int, options: dict) -> None:
    with pytest.raises(ValueError, match="batch"):
        pool(rows, **options)


def points_of(many: list[Points]) -> Counter:
    """Each point by its time, state and label."""
    return Counter((float(t), *x.flatten().tolist(), int(y)) for p in many for t, x, y in zip(p.t, p.x, p.labels))


def test_pool_uses_each_point_of_a_round_once() -> None:
    """Steps 8 to 11 are round 2: the points that paper mode, with room for all of them, draws at step 2."""
    p = pool(32, pool_steps=4)
    drawn = [draw(p, step) for step in range(8, 12)]
    assert len(points_of(drawn)) == 128 and p.count == 8 and p.teacher_forwards == 1.0
    assert points_of(drawn) == points_of([draw(pool(128, mode="paper"), 2)])
    assert all(len(set(points.t.tolist())) > 8 for points in drawn)  # a step mixes the nodes
    assert points_of([draw(p, 12)]) != points_of(drawn[:1])


def test_trajectories_do_not_depend_on_the_world(monkeypatch) -> None:
    """Two ranks, and rollouts in pieces of 3, make the points of one rank."""
    alone = draw(pool(32, pool_steps=4), 6)
    torch.testing.assert_close(draw(pool(32, pool_steps=4, rollout_batch=3), 6).x, alone.x)
    shards: dict[tuple, Tensor] = {}
    monkeypatch.setattr(distributed, "size", lambda: 2)
    for turn in range(2):  # first each rank leaves its shards, then each finds the other's
        for me in range(2):
            monkeypatch.setattr(distributed, "rank", lambda me=me: me)

            def gather(x: Tensor, dim: int = 0, me: int = me) -> Tensor:
                shards[dim, me] = x
                return torch.cat([shards.get((dim, other), x) for other in range(2)], dim)

            monkeypatch.setattr(distributed, "gather_rows", gather)
            points = draw(pool(32, pool_steps=4), 6)
            if turn:
                assert torch.equal(points.x, alone.x) and torch.equal(points.labels, alone.labels)


def test_start_labels_are_uniform() -> None:
    labels = Random(0, 1, 0).integers(rng.START_LABEL, torch.arange(20000), 10)
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10 and ((counts - 2000).abs() < 4 * math.sqrt(1800)).all()


def test_guidance_in_rollouts() -> None:
    """D = null + 2.5 (cond - null) with cond = label, null = -1."""
    points = draw(pool(128, guided(pull, 2.5), mode="paper"), 0)
    level = -1 + 2.5 * (points.labels[:8].float() + 1)
    torch.testing.assert_close(points.x_r[:8].mean((1, 2)), level, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="labels"):
        draw(pool(128, guided(pull, 2.5), mode="paper", classes=0), 0)
    assert guided(pull, 1.0) is pull


# ------------------------------------------------------------------------------------------ 4. pairs for flow maps


def test_a_sixteen_point_trajectory_has_120_pairs() -> None:
    straight = lambda x, t, r, labels: (x - 0.3) / paths.column(t, x)  # all data at 0.3: straight lines, Euler exact
    p = pool(6000, straight, LINEAR, 0, solver="euler", nfe=15, pool_steps=2)
    points, times = draw(p, 1), torch.tensor(p.plan.times)
    node = lambda t: (times - t[:, None]).abs().argmin(1).tolist()
    pairs = Counter(zip(node(points.t), node(points.r)))
    assert p.nodes == 16 and len(pairs) == 120 and all(i < j for i, j in pairs)
    assert max(pairs.values()) < 50 + 5 * math.sqrt(50) and min(pairs.values()) > 50 - 5 * math.sqrt(50)
    exact = lambda x, t, r, labels, drop: (x - 0.3) / paths.column(t, x)
    loss = lambda points: cmt.cmt_mf(exact, points, CmtMf(), World(LINEAR, Random(0, 0, 0)))[0]
    assert float(loss(points).max()) < 1e-6
    assert float(loss(points._replace(t=points.t + 0.1)).mean()) > 1e-3  # another time is another target


def test_flow_map_loss_to_zero_is_the_consistency_loss_over_t_squared() -> None:
    x, x_0, t = torch.randn(9, 4), torch.randn(9, 4), torch.rand(9) + 0.1
    points = Points(x, t, x_0, torch.zeros(9), None, None)
    f = lambda x, t, r, labels, drop: torch.sin(x) + paths.column(t, x)
    u = lambda x, t, r, labels, drop: (x - f(x, t, r, labels, drop)) / paths.column(t, x)
    flow_map, _ = cmt.cmt_mf(u, points, CmtMf(), World(LINEAR, Random(0, 0, 0)))
    state, _ = cmt.cmt_cm(f, points, CmtCm(distance="squared_l2"), World(VE, Random(0, 0, 0)))
    torch.testing.assert_close(flow_map, state / t**2, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ 5. ECT  6. ECD


@pytest.mark.parametrize(
    "q, t, r",
    [(4096, 0.1, 0.099883), (4096, 0.821, 0.82031), (4096, 80, 79.98047), (4, 0.821, 0.114035), (2, 0.821, 0)],
)
def test_earlier_time(q: float, t: float, r: float) -> None:
    assert float(consistency.earlier_time(full(1, t), q, 8.0, 1.0)) == pytest.approx(r, rel=6e-6)


def test_doubling_schedule() -> None:
    assert [consistency.schedule_stage(i / 8, 7) for i in range(8)] == list(range(8))
    assert consistency.schedule_stage(0.999, 7) == 7 and consistency.schedule_stage(0.9, 0) == 0
    exact = 0.5 * (1 - (1 + 8 / (1 + math.exp(0.5))) / 2**4)
    assert float(consistency.earlier_time(full(1, 0.5), 2, 8.0, 1.0, stage=3)) == pytest.approx(exact)


def student(x: Tensor, t: Tensor, r=None, labels=None, drop=None) -> Tensor:
    return 0.3 * x + paths.column(torch.sin(t), x)


def data(n: int = 64) -> tuple[Batch, World, Tensor, Tensor, Tensor]:
    """A batch, its world (ECT's times with the defaults), and t, x_t, eps of it, by hand."""
    ids, random, x_0 = torch.arange(n), Random(5, 2, 7), torch.randn(n, 2, 3, dtype=torch.float64)
    t = torch.exp(-1.1 + 2.0 * random.gauss(rng.TIME, ids)).double()
    eps = random.normal(rng.NOISE, ids, (2, 3)).double()
    batch = Batch(x_0, ids % 10, ids, torch.zeros(n, dtype=torch.bool))
    return batch, World(VE, random), t, x_0 + t.view(-1, 1, 1) * eps, eps


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    return torch.sqrt((a - b).square().flatten(1).sum(1) + c * c) - c


def test_ect_by_hand() -> None:
    """Same eps at t and r, clean data where r = 0, weight 1 / (t - r)."""
    batch, world, t, x_t, eps = data()
    r = consistency.earlier_time(t, 4, 8.0, 1.0)
    assert 0 < int((r == 0).sum()) < 64
    target = torch.where((r == 0).view(-1, 1, 1), batch.x_0, student(batch.x_0 + r.view(-1, 1, 1) * eps, r))
    for c in (0.0, 0.03):
        config = Ect(q=4, distance="pseudo_huber" if c else "l2", c=c or 0.01)
        loss, _ = consistency.ect(student, batch, config, world)
        torch.testing.assert_close(loss, huber(student(x_t, t), target, c) / (t - r))


@pytest.mark.parametrize("step", ["euler", "heun"])
def test_ecd_by_hand(step: str) -> None:
    """Teacher guided by 2.05, its Euler or Heun step, Huber .06, weight 1 / c_out^2."""
    batch, world, t, x_t, _ = data()

    def teacher(x: Tensor, t: Tensor, r, labels: Tensor, drop=None) -> Tensor:
        return 0.5 * x / (1 + paths.column(t, x)) + pull(x, t, r, labels, drop)

    d = lambda x, u: 0.5 * x / (1 + u) - 1 + 2.05 * (batch.labels.view(-1, 1, 1) + 1.0)
    column = lambda u: u.view(-1, 1, 1)
    r = consistency.earlier_time(t, 16, 8.0, 1.0)
    assert (r > 0).all()
    slope = (x_t - d(x_t, column(t))) / column(t)
    x_r = x_t + column(r - t) * slope
    if step == "heun":
        x_r = x_t + column(r - t) * (slope + (x_r - d(x_r, column(r))) / column(r)) / 2
    config = Ecd(q=16, c=0.06, step=step)
    assert config.weight == "snr" and config.distance == "pseudo_huber"
    loss, _ = consistency.ecd(student, batch, config, world._replace(teacher=guided(teacher, 2.05)))
    c_out = t * 0.5 / torch.sqrt(t**2 + 0.25)
    torch.testing.assert_close(loss, huber(student(x_t, t), student(x_r, r), 0.06) / c_out**2)


def test_step_to_zero_is_the_denoised_image() -> None:
    x, t = torch.randn(5, 2, 3), torch.rand(5) + 0.5
    for method in ("euler", "heun"):
        assert torch.equal(ve_step(student, x, t, torch.zeros(5), None, method), student(x, t))


# ------------------------------------------------------------------------------------------ 7. MeanFlow


def average_velocity_network(classes: int = 0) -> AverageVelocity:
    """A two-time MLP, weights random everywhere, float64."""
    net = build(Mlp(width=16, depth=2), "linear", 0.5, (2,), classes).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    assert isinstance(net, AverageVelocity)
    return net


def test_average_velocity_at_equal_times_is_the_velocity() -> None:
    net, z, t = average_velocity_network(), torch.randn(6, 2).double(), torch.rand(6).double()
    assert torch.equal(net(z, t), net(z, t, t))
    batch = Batch(torch.randn(32, 2).double(), None, torch.arange(32), None)
    world = World(LINEAR, Random(1, 2, 3))
    mean_flow, _ = meanflow.meanflow(net, batch, MeanFlow(ratio=0.0, p=0.0), world)
    torch.testing.assert_close(mean_flow, flow.flow(net, batch, Flow(), world)[0])


def test_a_quarter_of_the_rows_has_two_times() -> None:
    config = MeanFlow()
    k = meanflow.tangent_rows(256, config.ratio)
    t, r = meanflow.draw_times(torch.arange(256), k, config, World(LINEAR, Random(0, 0, 0)), torch.float32)
    assert k == 64 and (r[:k] < t[:k]).all() and torch.equal(r[k:], t[k:])
    assert ((t > 0) & (t < 1) & (r > 0)).all()


def test_tangent_agrees_with_finite_differences_to_second_order() -> None:
    net, (r, t) = average_velocity_network(), torch.rand(2, 8).double().sort(0).values
    z, v = torch.randn(2, 8, 2).double()
    exact = net(Dual(z, v), Dual(t, torch.ones_like(t)), Dual(r, torch.zeros_like(r))).tangent
    with torch.no_grad():
        difference = lambda h: (net(z + h * v, t + h, r) - net(z - h * v, t - h, r)) / (2 * h)
        gap = [float((difference(h) - exact).norm()) for h in (4e-3, 2e-3)]
    assert gap[1] < 1e-2 * float(exact.norm()) and gap[0] / gap[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("omega, kappa", [(3.0, 0.0), (0.2, 0.92)])
def test_guided_target_by_hand_with_one_label_mask(omega: float, kappa: float) -> None:
    """v~ = omega v + kappa u_c + (1 - omega - kappa) u_null, t <= .75 and the label kept; tangent (v~, 0, 1)."""
    n, k = 16, 4
    net, ids = average_velocity_network(classes=5), torch.arange(n)
    drop, labels, x_0 = ids % 5 == 0, ids % 5, torch.randn(n, 2).double()
    config, world = MeanFlow(omega=omega, kappa=kappa, guide_t_max=0.75), World(LINEAR, Random(1, 2, 3))
    masks = []

    def spy(x, t, r, labels, drop):
        masks.append(drop)
        return net(x, t, r, labels, drop)

    loss, _ = meanflow.meanflow(spy, Batch(x_0, labels, ids, drop), config, world)
    t, r = meanflow.draw_times(ids, k, config, world, x_0.dtype)
    z, v = LINEAR.point(x_0, t, world.random.key(rng.NOISE), ids)
    with torch.no_grad():
        cond, null = net(z, t, t, labels, drop), net(z, t, t, labels, torch.ones(n, dtype=torch.bool))
        mixed = omega * v + kappa * cond + (1 - omega - kappa) * null
        v = torch.where((~drop & (t <= 0.75)).view(-1, 1), mixed, v)
        h, first = 1e-5, slice(0, k)
        move = lambda s: net(z[first] + s * v[first], t[first] + s, r[first], labels[first], drop[first])
        target = v.clone()
        target[first] -= (t - r)[first].view(-1, 1) * (move(h) - move(-h)) / (2 * h)
        squared = (net(z, t, r, labels, drop) - target).square().sum(1)
    torch.testing.assert_close(loss, squared / (squared + 0.01), rtol=1e-5, atol=1e-7)
    for mask in masks:
        assert bool(mask.all()) or torch.equal(mask, drop[: len(mask)])


# ------------------------------------------------------------------------------------------ 8. samplers, wrapper


def recorded(calls: list, f):
    def net(x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        calls.append((x, float(t[0]), float(r[0])))
        return f(x, t)

    return net


@pytest.mark.parametrize("mid", [0.821, 1.526])
def test_two_step_consistency_sampling(mid: float) -> None:
    calls: list = []
    z, z_2 = torch.randn(2, 5, 3, dtype=torch.float64)
    out = sample_consistency(recorded(calls, student), 80 * z, 80.0, (mid,), [z_2], None)
    first = student(80 * z, full(5, 80.0))
    assert [c[1] for c in calls] == [80.0, mid]
    torch.testing.assert_close(out, student(first + mid * z_2, full(5, mid)))


def test_default_sampler_is_ects() -> None:
    setting, calls = Setting(VE, Sampler(), (3,), 0, CPU), []
    setting.few_steps(recorded(calls, student), 2, 0, torch.arange(4))
    assert [c[1] for c in calls] == [80.0, pytest.approx(0.821)]
    assert torch.equal(calls[0][0], 80 * setting.noise(0, torch.arange(4)))


def test_jumps_are_uniform() -> None:
    z = torch.randn(5, 3, dtype=torch.float64)
    u = lambda x, t: torch.sin(x) + paths.column(t, x)
    calls: list = []
    torch.testing.assert_close(sample_jumps(recorded(calls, u), z, 1, None), z - u(z, full(5, 1.0)))
    half = z - 0.5 * u(z, full(5, 1.0))
    out = sample_jumps(recorded(calls, u), z, 2, None)
    assert [c[1:] for c in calls] == [(1.0, 0.0), (1.0, 0.5), (0.5, 0.0)]
    torch.testing.assert_close(out, half - 0.5 * u(half, full(5, 0.5)))


def test_edm_preconditioning() -> None:
    """Input and training target of the network have unit variance for data of variance s^2, and lambda c_out^2 = 1."""
    t, s, x, seen = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0]).double(), 0.5, torch.ones(5, 1).double(), []
    call = lambda f: Denoiser(lambda x, c, r, labels, drop: (seen.append((x, c)), f(x))[1], s)(x, t)[:, 0]
    c_skip = call(torch.zeros_like)
    c_out, (c_in, c_noise), one = call(torch.ones_like) - c_skip, seen[0], torch.ones_like(t)
    torch.testing.assert_close(c_noise, t.log() / 4)
    torch.testing.assert_close(c_in[:, 0] ** 2 * (t**2 + s**2), one)
    torch.testing.assert_close(((1 - c_skip) ** 2 * s**2 + c_skip**2 * t**2) / c_out**2, one)
    torch.testing.assert_close((t**2 + s**2) / (t * s) ** 2 * c_out**2, one)
    torch.testing.assert_close(c_out**2, t**2 * c_skip)
