"""Shortcut models (Frans, Hafner, Levine and Abbeel 2024): jumps of lengths 2^-k, each of two of half the length.

The network is told where it is and how far it jumps. Jumps of length d are learned from two of length d/2,

    u(z, t - d, t) = ( u(z, t - d/2, t) + u(X_{t->t-d/2}(z), t - d, t - d/2) ) / 2,

with d drawn from 1, 1/2, ..., 2/N and t from the multiples of d, and u(z, t, t) by flow matching at the multiples of 1/N. The
halves of the shortest jumps, 1/N, are asked for as if they had no length, r = t: two Euler steps of the velocity. That is the
one approximation: at d = 2/N and from there up the map is right to order 1/N. Only jumps of these lengths from these times are
ever trained, so sampling has 1, 2, 4, ... N/2 steps.

In the paper 1/4 of rows bootstrap and N = 128. Its published code clips points and targets to [-4, 4], and guides the halves
of the shortest jumps, so that all others become guided jumps: `omega`, its cfg_scale (1.5 on ImageNet). Differences: that code
makes targets by the EMA's weights, which a loss has not here, so the weights as they are make them; it has equal numbers of
every d in a batch, here each row draws one; it bootstraps labelled rows alone, here a row without its label learns the null
class's jumps; its default share is 1/8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Shortcut
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.objectives import maps, rules
from cmt_fast.objectives.batch import Batch, LossContext, StageContext
from cmt_fast.objectives.meanflow import Drawn, tangent_rows


def check(config: Shortcut, setting: rules.Setting) -> None:
    """Raises ConfigError for a grid that has no halves, or a velocity that no row learns."""
    if config.grid < 2 or config.grid & (config.grid - 1):
        raise ConfigError(f"{setting.key}.grid: {config.grid} is no power of 2 from 2 on; published: 128")
    rules.velocity_is_learned(config, setting)


def steps(config: Shortcut) -> tuple[int, ...]:
    """The numbers of steps whose jumps are trained: 1, 2, 4, ... N/2."""
    return tuple(2**k for k in range(int(math.log2(config.grid))))


def draw(batch: Batch, config: Shortcut, context: LossContext) -> Drawn:
    """Two times a row, z = (1 - t) x_0 + t eps; the share `ratio` of rows with r = t - d comes first, the others have r = t."""
    k = tangent_rows(len(batch.x_0), config.ratio)
    t, r = (x.to(batch.x_0.dtype) for x in draw_times(batch.sample, k, config, context))
    z, v = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    return Drawn(z, v, t, r, batch.labels, batch.drop)


def draw_times(sample: Tensor, k: int, config: Shortcut, context: LossContext) -> tuple[Tensor, Tensor]:
    """The first k rows: d of 1, 1/2, ..., 2/N, t of d, 2d, ..., 1, r = t - d; the others t = r of 1/N, ..., 1. (B,), (B,)."""
    place = context.random.uniform(rng.TIME, sample)
    power = context.random.integers(rng.LENGTH, sample[:k], int(math.log2(config.grid)))
    d = torch.cat((torch.exp2(-power.to(place.dtype)), torch.full_like(place[k:], 1 / config.grid)))
    t = (torch.floor(place / d) + 1) * d
    return t, torch.cat((t[:k] - d[:k], t[k:]))


def loss(net, drawn: Drawn, config: Shortcut, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = ||u - sg[(u_1 + u_2) / 2]||^2,    u_1, u_2 of two jumps of half the length; ||u - (eps - x_0)||^2 where r = t

    Halves of the shortest jumps are asked for at r = t, and guided by omega. Returns (B,).
    """
    z, v, t, r, labels, drop, _ = drawn
    k = tangent_rows(len(z), config.ratio)
    target = torch.cat((two_halves(net, drawn, k, config), v[k:])) if k else v
    squared = (net(z, t, r, labels, drop) - target).square().flatten(1).sum(1)
    return squared, {"mse": squared.detach() / z[0].numel()}


@torch.no_grad()
def two_halves(net, drawn: Drawn, k: int, config: Shortcut) -> Tensor:
    """The average velocity of the first k rows in two jumps of half the length. (k, ...)."""
    z, t, r, (labels, drop) = drawn.z[:k], drawn.t[:k], drawn.r[:k], drawn.first(k)
    m, shortest = (t + r) / 2, t - r < 3 / config.grid
    told, clip = lambda t, r: torch.where(shortest, t, r), lambda x: _clipped(x, config.clip)

    def half(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u = net(z, t, told(t, r), labels, drop).to(z.dtype)
        if config.omega == 1 or labels is None:
            return u
        null = net(z, t, t, labels, torch.ones_like(shortest)).to(z.dtype)
        return torch.where(column(shortest, z).bool(), torch.lerp(null, u, config.omega), u)

    u_1 = half(z, t, m)
    return clip((u_1 + half(clip(maps.jump(z, u_1, t - m)), m, r)) / 2)


def _clipped(x: Tensor, most: float | None) -> Tensor:
    return x if most is None else x.clamp(-most, most)
