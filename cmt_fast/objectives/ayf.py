"""Align Your Flow (Sabour, Fidler and Kreis 2025, AYF-EMD): a teacher's flow map, distilled along the teacher's own ODE.

The flow map of the paper is f(x_t, t, s) = x_t + (s - t) F(x_t, t, s). Ours is the same in other words: with r for s and u for
F it is the jump f = z - (t - r) u(z, r, t). Where z moves with the ODE, dz/dt = v, and its end at r stays, a right map does
not change. What it does change by is

    df/dt = v - u - (t - r) du/dt,    du/dt along (v, 0, 1) in (z, r, t).

Theorem 3.2 gives the gradient that pulls it to zero, E[w' sign(t - r) f^T sg(df/dt)] differentiated in f. As df = -(t - r) du it
is -E[w' |t - r| du^T df/dt], and with w' = 1/|t - r|, as in algorithm 1, the gradient of half of

    || u - sg(u - g) ||^2,    g = u - v + (t - r) du/dt = -df/dt.

Two measures keep it calm. Its second term is the noisy one, so its share p grows from 0 to `most` over the first part of the
stage: at p = 0 the loss is || u - v ||^2, which asks for straight maps, and what is missing at 0.99 keeps a little of that.
Then g is divided by its length. The paper weighs no rows otherwise.

At rest u = v - p (t - r) du/dt: the teacher's flow map for p = 1. `most` below 1 therefore has a bias towards straight lines,
which the paper takes for its calm. v is the (guided) teacher's; autoguidance has a fixed scale here, where the paper draws one
a row from [1, 3] and tells the network. Numbers that are defaults: t - r = sigmoid(N(-0.8, 1)), r uniform in what is left, c =
0.1, the share full after 10,000 of 50,000 steps, and at most 0.99.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cmt_kernels import Dual
from torch import Tensor

from cmt_fast.config.schema import Ayf
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.objectives.batch import Batch, LossContext, StageContext


class Drawn(NamedTuple):
    """Points z: (B, ...), at times t, from which a jump leads to r < t: (B,) each; labels, drop: as of Batch.

    share: (), float64, of the derivative's term in g at this step.
    """

    z: Tensor
    t: Tensor
    r: Tensor
    share: Tensor
    labels: Tensor | None
    drop: Tensor | None


def draw(batch: Batch, config: Ayf, context: LossContext) -> Drawn:
    """Two times a row, z = (1 - t) x_0 + t eps."""
    t, r = draw_times(batch.sample, config, context, batch.x_0.dtype)
    z, _ = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    share = torch.full((), warm_up(context.progress, config), dtype=torch.float64, device=z.device)
    return Drawn(z, t, r, share, batch.labels, batch.drop)


def draw_times(sample: Tensor, config: Ayf, context: LossContext, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t - r = sigmoid(N(mean, std^2)), r uniform in [0, 1 - (t - r)]. (B,), (B,)."""
    span = torch.sigmoid(config.mean + config.std * context.random.gauss(rng.TIME, sample))
    r = (1 - span) * context.random.uniform(rng.TIME_R, sample)
    return (r + span).to(dtype), r.to(dtype)


def warm_up(progress: float, config: Ayf) -> float:
    """The share of the derivative's term in g: progress / warmup, and no more than `most`."""
    return min(config.most, progress / config.warmup) if config.warmup else config.most


def loss(net, drawn: Drawn, config: Ayf, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = (1/D) ||u - sg(u - g)||^2,    g = n(u - v + p (t - r) du/dt),    du/dt along (v, 0, 1) in (z, r, t)

    v is the (guided) teacher's velocity, p the share of this step, n(g) = g / (|g| + c) a row. Returns (B,). Scalars: mse,
    how far u is from straight, and tangent, |g| before n.
    """
    z, t, r, share, labels, drop = drawn
    v = stage.velocity(z, t, labels)
    u = net(Dual(z, v), Dual(t, torch.ones_like(t)), Dual(r, torch.zeros_like(r)), labels, drop)
    with torch.no_grad():
        g = u.value - v + share * column(t - r, z) * u.tangent
        size = column(g.flatten(1).norm(dim=1), g)
        if config.c is not None:
            g = g / (size + config.c)
    residual = u.value - u.value.detach() + g
    straight = (u.value.detach() - v).square().flatten(1).mean(1)
    return residual.square().flatten(1).mean(1), {"mse": straight, "tangent": size.flatten()}
