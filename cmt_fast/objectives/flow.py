"""Flow matching on the linear path (Lipman et al. 2023; SiT), the pre-training of MeanFlow models."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cmt_fast.config.schema import Flow
from cmt_fast.diffusion import rng
from cmt_fast.objectives import times
from cmt_fast.objectives.batch import Batch, LossContext, StageContext, composed


class Drawn(NamedTuple):
    """Points z_t and their velocities v = eps - x_0: (B, ...) each, at times t (B,); labels, drop: as of Batch."""

    z_t: Tensor
    v: Tensor
    t: Tensor
    labels: Tensor | None
    drop: Tensor | None


def draw(batch: Batch, config: Flow, context: LossContext) -> Drawn:
    """t by its law (times.py), z_t = (1 - t) x_0 + t eps."""
    t = times.drawn(rng.TIME, batch.sample, config, context, batch.x_0.dtype)
    z_t, v = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    return Drawn(z_t, v, t, batch.labels, batch.drop)


def loss(net, drawn: Drawn, config: Flow, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = ||u(z_t, t, t) - (eps - x_0)||^2

    t ~ logit-normal(mean, std). Returns (B,).
    """
    z_t, v, t, labels, drop = drawn
    squared = (net(z_t, t, t, labels, drop) - v).square().flatten(1).sum(1)
    return squared, {"mse": squared.detach() / v[0].numel()}


flow = composed(draw, loss)
