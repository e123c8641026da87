"""Align Your Flow against its theorem, its law of times and warm-up, and the closed form of a guided teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmt_fast.config.schema import Ayf
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion.guidance import Autoguided
from cmt_fast.diffusion.paths import column
from cmt_fast.evaluation.rest import LINEAR, MIXTURE, average_velocity, batch, gradients, size, world
from cmt_fast.objectives import OBJECTIVES, StageContext
from cmt_fast.objectives.ayf import draw, draw_times, warm_up
from tests.objectives import peers

WHOLE = Ayf(warmup=0.0, most=1.0, c=None)


def test_gradient_is_that_of_the_theorem() -> None:
    """Theorem 3.2, in the paper's own f, s and F: E[w' sign(t - s) f^T sg(df/dt)] with w' = 1/|t - s|; in D = 2 it is ours."""
    net, teacher = peers.network("linear"), peers.network("linear", 0.5).requires_grad_(False)
    drawn = draw(batch(40), WHOLE, world(LINEAR))
    x_t, t, s = drawn.z, drawn.t, drawn.r

    def f(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x + column(s - t, x) * net.plain(x, t, s)

    along = teacher.plain(x_t, t, t), torch.ones_like(t), torch.zeros_like(s)
    f_dot = torch.func.jvp(f, (x_t, t, s), along)[1].detach()
    theorem = torch.sign(t - s) / (t - s).abs() * (f(x_t, t, s) * f_dot).sum(1)
    loss, _ = OBJECTIVES["ayf"].loss(net, drawn, WHOLE, StageContext(LINEAR, teacher))
    ours, theirs = (torch.autograd.grad(x.mean(), list(net.parameters())) for x in (loss, theorem))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert max(float(g.abs().max()) for g in ours) > 1e-3


def test_times_are_the_published_law() -> None:
    """Spans are logit-normal whatever is left for r, which is uniform there; the data's dtype, inside [0, 1]."""
    n, config = 20000, Ayf()
    t, r = draw_times(torch.arange(n), config, world(LINEAR), torch.float64)
    span = t - r
    logit, place = torch.logit(span), r / (1 - span)
    assert float(r.min()) >= 0 and float(t.max()) <= 1
    assert abs(float(logit.mean()) + 0.8) < 4 / n**0.5 and abs(float(logit.std()) - 1) < 4 / (2 * n) ** 0.5
    assert abs(float(place.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5 and abs(float(place.std()) - 12**-0.5) < 0.004
    assert abs(float(torch.corrcoef(torch.stack((logit, place)))[0, 1])) < 4 / n**0.5
    assert draw_times(torch.arange(4), config, world(LINEAR), torch.float32)[0].dtype == torch.float32


def test_the_derivative_warms_up_to_99_hundredths() -> None:
    assert [warm_up(p, Ayf()) for p in (0.0, 0.05, 0.1, 0.2, 0.9)] == pytest.approx([0, 0.25, 0.5, 0.99, 0.99])
    assert warm_up(0.0, Ayf(warmup=0.0)) == 0.99
    assert float(draw(batch(2), Ayf(), world(LINEAR, progress=0.1)).share) == 0.5


def test_before_the_derivative_is_warm_the_answer_is_a_straight_line() -> None:
    """At share 0 the teacher's velocity is at rest for every r, at share 1 it is not; 0.99 is between and near."""
    velocity, teacher = Exact(MIXTURE, LINEAR), Exact(MIXTURE, LINEAR)
    grad = lambda known, most: size(
        gradients("ayf", known, batch(1000), Ayf(warmup=0.0, most=most, c=None), world(LINEAR, teacher))
    )
    assert grad(velocity, 0.0) < 1e-12 < 1e-2 < grad(velocity, 1.0)
    straight, almost, whole = (grad(average_velocity, most) for most in (0.0, 0.99, 1.0))
    assert whole < almost / 20 and almost == pytest.approx(straight / 100, rel=0.1)


def guided_map(net: Autoguided, z: Tensor, t: Tensor, r: Tensor, steps: int = 24) -> Tensor:
    """u(z, r, t) of the guided teacher's ODE, by Runge and Kutta's fourth order."""
    h, x = (r - t) / steps, z
    for i in range(steps):
        at = t + i * h
        k1 = net(x, at, at, None)
        k2 = net(x + column(h / 2, z) * k1, at + h / 2, at, None)
        k3 = net(x + column(h / 2, z) * k2, at + h / 2, at, None)
        x = x + column(h / 6, z) * (k1 + 2 * k2 + 2 * k3 + net(x + column(h, z) * k3, at + h, at, None))
    return (z - x) / column(t - r, z)


def test_an_autoguided_teacher_leads_to_the_guided_flow_map() -> None:
    """Two mixtures of which the weaker is the wider: the guided map is at rest, the teacher's own is not."""
    wide = MIXTURE.__class__(n=MIXTURE.n, std=1.4 * MIXTURE.std)
    strong, weak = (Exact(m, LINEAR) for m in (MIXTURE, wide))
    teacher = Autoguided(lambda x, t, r, labels: strong(x, t), lambda x, t, r, labels: weak(x, t), 1.5)
    grad = lambda known: size(gradients("ayf", known, batch(500), WHOLE, world(LINEAR, teacher)))
    rest, plain = grad(lambda z, t, r: guided_map(teacher, z, t, r)), grad(average_velocity)
    assert rest < plain / 100
