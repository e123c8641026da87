"""The method, number by number: the solver's grid, teacher trajectories in bulk, pairs for flow maps."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from cmt_fast import models
from cmt_fast.config.schema import CmtCm, CmtMf, Mlp, Trajectories
from cmt_fast.diffusion import paths, rng
from cmt_fast.diffusion.guidance import guided
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import dpmpp_coefficients, rollout, table
from cmt_fast.objectives import LossContext, Points, cmt
from cmt_fast.runtime import distributed
from cmt_fast.teacher.pool import Pool, Prior

VE, LINEAR = ProbabilityPath("ve"), ProbabilityPath("linear")
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
def test_tables_that_do_not_exist(
    path: ProbabilityPath, solver: str, nfe: int, t_max: float, t_min: float, key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        table(path, solver, nfe, t_max, t_min)


# ------------------------------------------------------------------------------------------ 3. trajectories in bulk


def pull(x: Tensor, t: Tensor, r: Tensor | None, labels: Tensor | None, drop: Tensor | None = None) -> Tensor:
    """D = label, or -1 where it is dropped: the solver is exact, x_k = D + (t_k / t_0) (x_T - D)."""
    level = torch.zeros_like(t) if labels is None else labels.to(x.dtype)
    level = level if drop is None else torch.where(drop, -1.0, level)
    return paths.column(level, x).expand_as(x)


def pool(rows: int, teacher=pull, path: ProbabilityPath = VE, classes: int = 10, seed: int = 3, **options) -> Pool:
    config = Trajectories(**{"t_max": 80.0 if path is VE else 1.0, "t_min": 0.002 if path is VE else 0.0} | options)
    return Pool(teacher, path, config, Prior((2, 3), classes, seed, 1), rows, CPU)


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


def test_a_stage_that_was_rolled_back_has_other_trajectories() -> None:
    """From its step on; those of before stay, whichever was asked for last, and each draw is one."""
    p = pool(32, pool_steps=4)
    first, other = draw(p, 9), p.draw(9, torch.arange(32), 1)
    assert not points_of([first]) & points_of([other]) and points_of([draw(p, 9)]) == points_of([first])
    assert points_of([pool(32, pool_steps=4).draw(9, torch.arange(32), 1)]) == points_of([other])


def test_fewer_points_a_trajectory_are_spread_over_it() -> None:
    """4 of 16 nodes from each of 80 trajectories: evenly spaced from a first node that differs, every node as often."""
    p = pool(32, pool_steps=10, per_trajectory=4)
    drawn = [draw(p, step) for step in range(10)]
    assert p.count == 80 and p.teacher_forwards == 4.0 and len(points_of(drawn)) == 320
    nodes: dict[tuple, list[int]] = {}
    for points in drawn:
        for t, end in zip(points.t, points.x_r):
            node = int((torch.tensor(SIXTEEN) - t).abs().argmin())
            nodes.setdefault(tuple(end.flatten().tolist()), []).append(node)
    assert len(nodes) == 80 and all(len(n) == 4 for n in nodes.values())
    assert all({i % 4 for i in n} == {n[0] % 4} and len(set(n)) == 4 for n in nodes.values())
    assert len({n[0] % 4 for n in nodes.values()}) == 4


def test_trajectories_do_not_depend_on_the_world(monkeypatch) -> None:
    """Two ranks, and rollouts in pieces of 3, make the points of one rank."""
    alone = draw(pool(32, pool_steps=4), 6)
    torch.testing.assert_close(draw(pool(32, pool_steps=4, rollout_batch=3), 6).x, alone.x)
    shards: dict[tuple, Tensor] = {}
    monkeypatch.setattr(distributed, "size", lambda: 2)
    for turn in range(2):  # first each rank leaves its shares, then each finds the other's
        for me in range(2):
            calls = iter(range(99))  # every node, then the labels
            monkeypatch.setattr(distributed, "rank", lambda me=me: me)

            def share(x: Tensor, me: int = me, calls=calls) -> None:
                shards[k := next(calls), me] = x.chunk(2)[me].clone()
                x.copy_(torch.cat([shards.get((k, other), shards[k, me]) for other in range(2)]))

            monkeypatch.setattr(distributed, "share_rows", share)
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


SOLVERS = [("ve", "dpmpp", 3), ("ve", "euler", 1), ("ve", "heun", 1), ("linear", "dpmpp", 3)]
SOLVERS += [("linear", solver, 1) for solver in ("euler", "heun", "jump")]


def perturbed(path: str) -> torch.nn.Module:
    net = models.build(Mlp(width=16, depth=1), path, 0.5, (6,), 3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("path, solver, order", SOLVERS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_fused_step_is_guidance_preconditioning_and_update(path: str, solver: str, order: int, scale: float) -> None:
    """The rollout calls a network's raw output; the same network seen as a plain prediction gives the same nodes."""
    forward, net = paths.ProbabilityPath(path), perturbed(path).double()
    plan = table(forward, solver, 8, *((80.0, 0.002) if path == "ve" else (1.0, 0.0)), order)
    x, labels = torch.randn(5, 6, dtype=torch.float64) * plan.times[0], torch.tensor([0, 1, 2, 0, 1])
    teacher = guided(net, scale)
    plain = rollout(lambda *arguments: teacher(*arguments), forward, plan, x, labels)
    fused = rollout(teacher, forward, plan, x, labels)
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    assert fused.shape == (len(plan.times), 5, 6) and torch.equal(fused[0], x)
    assert torch.equal(rollout(teacher, forward, plan, x, labels, dense=False), fused[-1])
    assert (fused[-1] - fused[0]).abs().max() > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["ve", "linear"])
def test_a_whole_rollout_is_one_cuda_graph(path: str) -> None:
    net, forward = perturbed(path).cuda(), paths.ProbabilityPath(path)
    plan = table(forward, "dpmpp", 16, *((80.0, 0.002) if path == "ve" else (1.0, 0.0)))
    x, labels = torch.randn(64, 6, device="cuda") * plan.times[0], torch.arange(64, device="cuda") % 3
    teacher = guided(net, 2.5)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            rollout(teacher, forward, plan, x, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nodes = rollout(teacher, forward, plan, x, labels)
    x.copy_(torch.randn_like(x) * plan.times[0])
    graph.replay()
    assert torch.equal(nodes, rollout(teacher, forward, plan, x, labels))


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
    loss = lambda points: cmt.cmt_mf(exact, points, CmtMf(), LossContext(LINEAR, Random(0, 0, 0)))[0]
    assert float(loss(points).max()) < 1e-6
    assert float(loss(points._replace(t=points.t + 0.1)).mean()) > 1e-3  # another time is another target


def test_flow_map_loss_to_zero_is_the_consistency_loss_over_t_squared() -> None:
    x, x_0, t = torch.randn(9, 4), torch.randn(9, 4), torch.rand(9) + 0.1
    points = Points(x, t, x_0, torch.zeros(9), None, None)
    f = lambda x, t, r, labels, drop: torch.sin(x) + paths.column(t, x)
    u = lambda x, t, r, labels, drop: (x - f(x, t, r, labels, drop)) / paths.column(t, x)
    flow_map, _ = cmt.cmt_mf(u, points, CmtMf(), LossContext(LINEAR, Random(0, 0, 0)))
    state, _ = cmt.cmt_cm(f, points, CmtCm(distance="squared_l2"), LossContext(VE, Random(0, 0, 0)))
    torch.testing.assert_close(flow_map, state / t**2, rtol=1e-4, atol=1e-5)
