"""The method, number by number: objectives and samplers as published."""

from __future__ import annotations

import math

import pytest
import torch
from cmt_kernels import Dual
from torch import Tensor

from cmt_fast.config.schema import CmtMf, Ecd, Ect, Flow, IMeanFlow, MeanFlow, Mlp, SamplerConfig
from cmt_fast.diffusion import paths, rng
from cmt_fast.diffusion.few_steps import sample_consistency, sample_jumps
from cmt_fast.diffusion.guidance import guided
from cmt_fast.diffusion.labels import Law
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.diffusion.solvers import ve_step
from cmt_fast.models import build
from cmt_fast.models.precond import AverageVelocity, Denoiser
from cmt_fast.objectives import Batch, LossContext, cmt, consistency, flow, meanflow
from cmt_fast.objectives.batch import Points

VE, LINEAR = ProbabilityPath("ve"), ProbabilityPath("linear")
CPU = torch.device("cpu")


def full(n: int, value: float, dtype=torch.float64) -> Tensor:
    return torch.full((n,), value, dtype=dtype)


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


def data(n: int = 64) -> tuple[Batch, LossContext, Tensor, Tensor, Tensor]:
    """A batch, its world (ECT's times with the defaults), and t, x_t, eps of it, by hand."""
    ids, random, x_0 = torch.arange(n), Random(5, 2, 7), torch.randn(n, 2, 3, dtype=torch.float64)
    t = torch.exp(-1.1 + 2.0 * random.gauss(rng.TIME, ids)).double()
    eps = random.normal(rng.NOISE, ids, (2, 3)).double()
    batch = Batch(x_0, ids % 10, ids, torch.zeros(n, dtype=torch.bool))
    return batch, LossContext(VE, random), t, x_0 + t.view(-1, 1, 1) * eps, eps


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
        level = torch.where(drop, -1.0, labels.to(x.dtype))
        return 0.5 * x / (1 + paths.column(t, x)) + paths.column(level, x)

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


# met in public: Lyy-iiis/imeanflow#4
def test_average_velocity_at_equal_times_is_the_velocity() -> None:
    net, z, t = average_velocity_network(), torch.randn(6, 2).double(), torch.rand(6).double()
    assert torch.equal(net(z, t), net(z, t, t))
    batch = Batch(torch.randn(32, 2).double(), None, torch.arange(32), None)
    world = LossContext(LINEAR, Random(1, 2, 3))
    mean_flow, _ = meanflow.meanflow(net, batch, MeanFlow(ratio=0.0, p=0.0), world)
    for loss, t in (  # both are flow matching, MeanFlow's at the later of two draws
        (mean_flow, meanflow.draw_times(batch.sample, 0, MeanFlow(), world, torch.float64)[0]),
        (
            flow.flow(net, batch, Flow(), world)[0],
            torch.sigmoid(world.random.gauss(rng.TIME, batch.sample) - 0.4).double(),
        ),
    ):
        z, v = LINEAR.point(batch.x_0, t, world.random.key(rng.NOISE), batch.sample)
        torch.testing.assert_close(loss, (net(z, t, t) - v).square().sum(1))


# met in public: facebookresearch/flow_matching#82
def test_a_quarter_of_the_rows_has_two_times() -> None:
    config = MeanFlow()
    k = meanflow.tangent_rows(256, config.ratio)
    t, r = meanflow.draw_times(torch.arange(256), k, config, LossContext(LINEAR, Random(0, 0, 0)), torch.float32)
    assert k == 64 and (r[:k] < t[:k]).all() and torch.equal(r[k:], t[k:])
    assert ((t > 0) & (t < 1) & (r > 0)).all()


@pytest.mark.parametrize("config", [MeanFlow(mean=-0.4, std=1.0), IMeanFlow(mean=0.3, std=0.8)])
def test_rows_of_one_time_take_the_later_of_two_draws(config: MeanFlow) -> None:
    """Row by row from the two streams; and their law, F(t)^2 for F(t) = Phi((logit t - mean) / std): at the median of one
    draw it is a quarter. As in Gsunshine/meanflow and imeanflow (`sample_tr`), zhuyu-cs/MeanFlow and py-meanflow's v0."""
    ids, random = torch.arange(20_000), Random(0, 0, 0)
    t, r = meanflow.draw_times(ids, 7_000, config, LossContext(LINEAR, random), torch.float64)
    one, two = (torch.sigmoid(config.mean + config.std * random.gauss(s, ids)).double() for s in (rng.TIME, rng.TIME_R))
    assert torch.equal(t, torch.maximum(one, two)) and torch.equal(r[:7_000], torch.minimum(one, two)[:7_000])
    assert torch.equal(r[7_000:], t[7_000:])
    z = (torch.logit(t[7_000:]) - config.mean) / config.std
    for level, below in ((-1.0, 0.0252), (0.0, 0.25), (1.0, 0.7079)):  # Phi(level)^2
        n = len(z)
        assert abs(float((z < level).double().mean()) - below) < 4 * math.sqrt(below * (1 - below) / n)


def test_a_row_without_its_label_follows_the_null_class() -> None:
    """Improved MeanFlow: such a row's u, and the velocity that its derivative is taken along, are the null class's."""
    n, k = 8, 4
    net, ids = average_velocity_network(classes=5), torch.arange(n)
    config, world = IMeanFlow(omega=2.0), LossContext(LINEAR, Random(1, 2, 3))
    x_0, dropped = torch.randn(n, 2).double(), torch.ones(n, dtype=torch.bool)
    of = lambda labels, drop: meanflow.improved(net, Batch(x_0, labels, ids, drop), config, world)[0]
    lost = of(ids % 5, dropped)
    assert torch.equal(lost, of((ids + 3) % 5, dropped))  # whichever label it was
    assert not torch.equal(lost, of(ids % 5, ~dropped))
    t, r = meanflow.draw_times(ids, k, config, world, x_0.dtype)
    z, v = LINEAR.point(x_0, t, world.random.key(rng.NOISE), ids)
    null = torch.full_like(ids, 5)
    with torch.no_grad():
        own, h = net(z, t, t, null), 1e-5
        moved = lambda s: net(z + s * own, t + s, r, null)
        gap = net(z, t, r, null) + (t - r).view(-1, 1) * (moved(h) - moved(-h)) / (2 * h) - v
    squared = gap.square().sum(1)
    torch.testing.assert_close(lost, squared / (squared + 0.01), rtol=1e-5, atol=1e-7)


def test_tangent_agrees_with_finite_differences_to_second_order() -> None:
    net, (r, t) = average_velocity_network(), torch.rand(2, 8).double().sort(0).values
    z, v = torch.randn(2, 8, 2).double()
    exact = net(Dual(z, v), Dual(t, torch.ones_like(t)), Dual(r, torch.zeros_like(r))).tangent
    with torch.no_grad():
        difference = lambda h: (net(z + h * v, t + h, r) - net(z - h * v, t - h, r)) / (2 * h)
        gap = [float((difference(h) - exact).norm()) for h in (4e-3, 2e-3)]
    assert gap[1] < 1e-2 * float(exact.norm()) and gap[0] / gap[1] == pytest.approx(4, rel=0.05)


# met in public: zhuyu-cs/MeanFlow#2
@pytest.mark.parametrize("omega, kappa", [(3.0, 0.0), (0.2, 0.92)])
def test_guided_target_by_hand_with_one_label_mask(omega: float, kappa: float) -> None:
    """v~ = omega v + kappa u_c + (1 - omega - kappa) u_null, t <= .75 and the label kept; tangent (v~, 0, 1)."""
    n, k = 16, 4
    net, ids = average_velocity_network(classes=5), torch.arange(n)
    drop, labels, x_0 = ids % 5 == 0, ids % 5, torch.randn(n, 2).double()
    config, world = MeanFlow(omega=omega, kappa=kappa, guide_t_max=0.75), LossContext(LINEAR, Random(1, 2, 3))
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


def test_l2_losses_are_sums_over_the_numbers_of_a_row() -> None:
    """What `grad_clip_norm` is of: the loss of a row is `mse` times the row's numbers, for every l2 loss without a weight."""
    net, ids = average_velocity_network(), torch.arange(6)
    world, x = LossContext(LINEAR, Random(1, 2, 3)), torch.randn(6, 2).double()
    points = Points(x, torch.full((6,), 0.9).double(), x / 2, torch.full((6,), 0.1).double(), None, None, ids)
    for loss, scalars in (
        flow.flow(net, Batch(x, None, ids, None), Flow(), world),
        cmt.cmt_mf(net, points, CmtMf(), world),
    ):
        torch.testing.assert_close(loss, scalars["mse"] * x[0].numel())
        assert bool((loss.detach() > 0).all())


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
    setting, calls = Sampler(VE, SamplerConfig(), (3,), Law.uniform(0), CPU), []
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
