"""The wider family against the closed form: continuous-time consistency, improved MeanFlow, guided targets and teachers."""

from __future__ import annotations

import pytest
import torch
from cmt_kernels import Dual
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_fast.config.schema import Dit, Ecd, Gmm, IMeanFlow, MeanFlow, Mlp, SamplerConfig, Scd, Sct
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.guidance import Autoguided
from cmt_fast.diffusion.labels import Law
from cmt_fast.diffusion.paths import column
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.diffusion.solvers import grid
from cmt_fast.evaluation import rest as gmm
from cmt_fast.evaluation.rest import LINEAR, MIXTURE, OFF, VE, Net, batch, errors, gradients, size
from cmt_fast.models import build
from cmt_fast.models.precond import Denoiser, NoiseDenoiser
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext
from cmt_fast.objectives.continuous import warm_up
from cmt_fast.objectives.meanflow import draw_times


def perturbed(net: torch.nn.Module) -> torch.nn.Module:
    """Weights random everywhere, gates too, float64."""
    with torch.no_grad():
        for p in net.double().parameters():
            p.copy_(0.2 * torch.randn_like(p))
    return net


def network(path: str, classes: int = 0, kind: str = "mlp") -> torch.nn.Module:
    if kind != "dit":
        return perturbed(build(Mlp(width=16, depth=2), path, 0.5, (2,), classes))
    return perturbed(build(Dit(width=16, depth=1, heads=2, patch=4), path, 0.5, (2, 8, 8), classes))


# ------------------------------------------------------------------------------------------ the denoiser's tangent


@pytest.mark.parametrize("kind, shape", [("mlp", (2,)), ("noise", (2,)), ("dit", (2, 8, 8))])
@pytest.mark.parametrize("moves", ["both", "x", "t"])
@pytest.mark.parametrize("k", [6, 2])
def test_denoiser_tangent_against_func_jvp(kind: str, shape: tuple, moves: str, k: int) -> None:
    net, t = network("ve", 3, kind), torch.tensor([0.002, 0.05, 0.5, 1.0, 9.0, 80.0]).double()
    if kind == "noise":  # a network of DDPM's steps; 0.002 is below the first
        net = NoiseDenoiser(network("ve", 3).net).double()
    x, x_dot = torch.randn(2, 6, *shape).double()
    x, labels = x * column(1 + t, x), torch.tensor([0, 1, 2, 0, 1, 2])
    drop, t_dot = labels == 1, torch.randn(6).double() * t
    dots = (
        x_dot[:k] if moves != "t" else torch.zeros_like(x[:k]),
        t_dot[:k] if moves != "x" else torch.zeros_like(t[:k]),
    )
    d = net(Dual(x, dots[0]) if moves != "t" else x, Dual(t, dots[1]) if moves != "x" else t, None, labels, drop)
    assert torch.equal(d.value, net(x, t, None, labels, drop)) and not d.tangent.requires_grad
    with sdpa_kernel(SDPBackend.MATH):
        _, want = torch.func.jvp(lambda x, t: net(x, t, None, labels[:k], drop[:k]), (x[:k], t[:k]), dots)
    assert want.abs().amax(tuple(range(1, x.ndim))).min() > 1e-6
    torch.testing.assert_close(d.tangent, want, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------ sCT and sCD


def published(net: Denoiser, batch: Batch, config: Sct | Scd, world: LossContext) -> Tensor:
    """The loss of Lu & Song 2024 in TrigFlow's own variables, the derivative of F by torch.func.jvp. (B,)."""
    s = world.path.sigma_data
    t = torch.exp(config.mean + config.std * world.random.gauss(rng.TIME, batch.sample)).double()
    theta = torch.atan(t / s)
    cos, sin = torch.cos(theta)[:, None], torch.sin(theta)[:, None]
    z = s * world.random.normal(rng.NOISE, batch.sample, batch.x_0.shape[1:])
    x = cos * batch.x_0 + sin * z
    big_f = lambda x, theta: -net.net(x / s, torch.log(s * torch.tan(theta)) / 4, None, batch.labels, batch.drop)
    x_dot = cos * z - sin * batch.x_0
    if config.kind == "scd":
        denoised = world.teacher(x / cos, s * torch.tan(theta), None, batch.labels)
        x_dot = (cos * x - denoised) / sin  # s F of the teacher, whose f = cos x - s sin F is its denoised image
    f = big_f(x, theta)
    _, f_dot = torch.func.jvp(big_f, (x, theta), (cos * sin * x_dot, (cos * sin)[:, 0]))
    share = min(1.0, world.nimg / config.warmup_nimg) if config.warmup_nimg else 1.0
    g = -(cos**2) * (s * f - x_dot) - share * (cos * sin * x + s * f_dot)
    if config.c is not None:
        g = g / (g.norm(dim=1, keepdim=True) + config.c)
    return (f - f.detach() - g.detach()).square().mean(1)


@pytest.mark.parametrize("kind", ["sct", "scd"])
@pytest.mark.parametrize("c, nimg", [(0.1, 0), (0.1, 250), (None, 1000)])
def test_continuous_loss_is_the_published_one(kind: str, c: float | None, nimg: int) -> None:
    net, x_0 = network("ve", 3), 0.5 * torch.randn(32, 2).double()
    labels = torch.arange(32) % 3
    rows = Batch(x_0, labels, torch.arange(32), labels == 1)
    config = (Sct if kind == "sct" else Scd)(c=c, warmup_nimg=1000)
    world = LossContext(VE, Random(3, 2, 1), network("ve", 3) if kind == "scd" else None, nimg=nimg)
    ours, _ = OBJECTIVES[kind].function(net, rows, config, world)
    theirs = published(net, rows, config, world)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)
    grads = [torch.autograd.grad(loss.mean(), list(net.parameters())) for loss in (ours, theirs)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_warm_up_grows_to_one() -> None:
    assert [warm_up(n, 400) for n in (0, 100, 400, 900)] == [0, 0.25, 1, 1] and warm_up(0, 0) == 1


def test_sct_rejects_the_posterior_mean() -> None:
    assert errors(gmm.gradients_of("sct", Exact(MIXTURE, VE))) > 10


@pytest.mark.parametrize("c", [0.1, None])
def test_scd_is_at_rest_at_the_answer(c: float | None) -> None:
    """Row by row, normalised or not: along the exact teacher's ODE nothing of f changes."""
    config, at = Scd(c=c), LossContext(VE, Random(0, 0, 0), Exact(MIXTURE, VE))
    rest = size(gradients("scd", gmm.consistency, batch(2000), config, at))
    off = size(gradients("scd", gmm.consistency, batch(2000), config, at, OFF))
    wrong = size(gradients("scd", Exact(MIXTURE, VE), batch(2000), config, at))
    assert rest < off / 100 and rest < wrong / 100


def test_denoiser_is_at_rest_before_the_derivative_is_warm() -> None:
    config = Sct(c=None, mean=-0.4, std=0.8, warmup_nimg=1000)
    cold, half = (LossContext(VE, Random(0, 0, 0), nimg=n) for n in (0, 500))
    assert errors(gradients("sct", Exact(MIXTURE, VE), batch(6000), config, cold)) < 4
    assert errors(gradients("sct", Exact(MIXTURE, VE), batch(6000), config, half)) > 10


# ------------------------------------------------------------------------------------------ improved MeanFlow


def test_improved_meanflow_rejects_the_velocity() -> None:
    assert errors(gmm.gradients_of("imeanflow", Exact(MIXTURE, LINEAR))) > 10


def test_improved_meanflow_gradients_equal_func_jvp_along_the_own_velocity() -> None:
    net, config = network("linear", 3), IMeanFlow(ratio=0.5, p=0.75, c=0.03)
    labels = torch.arange(16) % 3
    rows = Batch(torch.randn(16, 2).double(), labels, torch.arange(16), labels == 2)
    world = LossContext(LINEAR, Random(1, 2, 3))
    t, r = draw_times(rows.sample, 8, config, world, torch.float64)
    z, v = world.path.point(rows.x_0, t, world.random.key(rng.NOISE), rows.sample)
    own = net(z, t, t, labels, rows.drop)
    call = lambda z, t, r: net(z, t, r, labels, rows.drop)
    u, u_dot = torch.func.jvp(call, (z, t, r), (own.detach(), torch.ones_like(t), torch.zeros_like(r)))
    squared = (u + column(t - r, z) * u_dot.detach() - v).square().sum(1)
    want = squared / (squared.detach() + 0.03) ** 0.75
    got, _ = OBJECTIVES["imeanflow"].function(net, rows, config, world)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    grads = [torch.autograd.grad(loss.mean(), list(net.parameters())) for loss in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


# ------------------------------------------------------------------------------------------ guidance inside MeanFlow

PUBLISHED = [  # omega, kappa, guide_t_min, guide_t_max, effective scale
    (1.0, 0.5, 0.0, 1.0, 2.0),  # B/4 and B/2
    (3.0, 0.0, 0.0, 1.0, 3.0),  # B/4, without kappa
    (0.2, 0.92, 0.0, 0.8, 2.5),  # L/2
    (0.2, 0.92, 0.0, 0.75, 2.5),  # XL/2
]


class TwoClasses(Net):
    """Two Gaussians at +1 and -1: u(z, t, t) is v_null + scale (v_class - v_null) inside the interval, theta beside it."""

    def __init__(self, rows: int, scale: float, low: float, high: float, theta: float = 0.0) -> None:
        super().__init__(None, rows, theta)
        self.scale, self.low, self.high = scale, low, high

    def __call__(self, z, t, r=None, labels=None, drop=None):
        with torch.no_grad():
            null, conditional = velocities(z, t, labels)
            inside = column((t >= self.low) & (t <= self.high) & ~drop, z).bool()
            dropped = column(drop, z).bool()
            u = torch.where(dropped, null, conditional)
            u = torch.where(inside, torch.lerp(null, conditional, self.scale), u)
        sign = torch.where((labels == 0) | drop, 1.0, -1.0).to(z.dtype)[:, None]  # the classes mirror each other
        return u + torch.einsum("bf,bfd->bd", sign * gmm.phi(sign * z, t, t), self.theta[: len(z)])


def velocities(z: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Marginal velocity of both classes together, and of each row's own. (B, 2)."""
    both = Exact(Gmm(components=2, radius=1.0, std=0.3), LINEAR)
    sign = torch.where(labels == 0, 1.0, -1.0).to(z.dtype)[:, None]
    one = Exact(Gmm(components=1, radius=1.0, std=0.3), LINEAR)
    return both(z, t), sign * one(sign * z, t)


@pytest.mark.parametrize("omega, kappa, low, high, scale", PUBLISHED)
def test_effective_scale_of_published_guidance(omega, kappa, low, high, scale) -> None:
    """At r = t the point of rest is the velocity guided by omega / (1 - kappa), inside the interval alone."""
    n, random = 12000, Random(0, 0, 7)
    sample = torch.arange(n)
    labels = sample % 2
    centre = torch.stack((torch.where(labels == 0, 1.0, -1.0), torch.zeros(n)), dim=1)
    x_0 = (centre + 0.3 * random.normal(rng.DATA, sample, (2,))).double()
    drop = random.uniform(rng.DROP, sample) < 0.1
    rows, config = (
        Batch(x_0, labels, sample, drop),
        MeanFlow(ratio=0.0, p=0.0, omega=omega, kappa=kappa, guide_t_min=low, guide_t_max=high),
    )

    def grad(scale: float, high: float) -> Tensor:
        net = TwoClasses(n, scale, low, high)
        loss, _ = OBJECTIVES["meanflow"].function(net, rows, config, LossContext(LINEAR, random))
        return torch.autograd.grad(loss.sum(), net.theta)[0].flatten(1)

    assert scale == pytest.approx(omega / (1 - kappa))
    assert errors(grad(scale, high)) < 4
    assert errors(grad(1.0, high)) > 8 and errors(grad(scale + 1, high)) > 8
    if high < 1:
        assert errors(grad(scale, 1.0)) > 6


# ------------------------------------------------------------------------------------------ autoguidance


class Gaussian:
    """The denoiser of N(mu, std^2 I)."""

    mu = torch.tensor([0.7, -0.2], dtype=torch.float64)

    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.mu + column(self.std**2 / (self.std**2 + t**2), x) * (x - self.mu)


def guided_end(x: Tensor, t: Tensor, scale: float, main: float, guide: float) -> Tensor:
    """Where the autoguided ODE of two Gaussians ends: |x - mu| goes as the product of their spreads' powers."""
    shrink = lambda std: column(std / torch.sqrt(std**2 + t**2), x)
    return Gaussian.mu + (x - Gaussian.mu) * shrink(main) ** scale * shrink(guide) ** (1 - scale)


def test_autoguidance_is_the_published_mix() -> None:
    x, t = torch.randn(5, 2).double(), torch.rand(5).double() + 0.1
    main, guide = Gaussian(0.3), Gaussian(0.5)
    mixed = Autoguided(main, guide, 2.05)(x, t, t, None)
    torch.testing.assert_close(mixed, guide(x, t) + 2.05 * (main(x, t) - guide(x, t)))
    torch.testing.assert_close(Autoguided(main, guide, 1.0)(x, t, t, None), main(x, t))


def test_autoguided_ecd_is_at_rest_at_the_guided_answer() -> None:
    """Heun's steps of 1/64: the guided flow map of two Gaussians is at rest, the unguided one is not."""
    config = Ecd(q=64, k=0, distance="squared_l2")
    at = LossContext(VE, Random(0, 0, 0), Autoguided(Gaussian(0.3), Gaussian(0.5), 2.05))
    rows = Batch(Gaussian.mu + 0.3 * torch.randn(2000, 2).double(), None, torch.arange(2000), None)
    known = lambda scale: lambda x, t, r=None: guided_end(x, t, scale, 0.3, 0.5)
    rest, plain = (size(gradients("ecd", known(scale), rows, config, at)) for scale in (2.05, 1.0))
    off = size(gradients("ecd", known(2.05), rows, config, at, OFF))
    assert rest < plain / 300 and rest < off / 300


# ------------------------------------------------------------------------------------------ two-step samplers


def test_published_second_times() -> None:
    """0.77569 of mid-training is node 7 of its 16 steps; after ECT 0.821; flow maps halve the way."""
    assert grid(VE, 16, 80.0, 0.002)[7] == pytest.approx(0.77569, abs=5e-6)
    assert SamplerConfig().mid_times[2] == (0.821,)
    seen: list[tuple[float, float]] = []
    net = lambda x, t, r, labels: (seen.append((float(t[0]), float(r[0]))), torch.zeros_like(x))[1]
    setting = Sampler(VE, SamplerConfig(mid_times={2: (1.526,)}), (2,), Law.uniform(0), torch.device("cpu"))
    setting.few_steps(net, 2, 0, torch.arange(3))
    Sampler(LINEAR, SamplerConfig(), (2,), Law.uniform(0), torch.device("cpu")).few_steps(net, 2, 0, torch.arange(3))
    assert [t for t, _ in seen[:2]] == pytest.approx([80.0, 1.526]) and seen[2:] == [(1.0, 0.5), (0.5, 0.0)]
