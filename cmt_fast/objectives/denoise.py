"""EDM denoising (Karras et al. 2022, eq. 3 and table 1; 2024, EDM2, eq. 21), the pre-training of VE models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmt_fast.config.schema import Denoise
from cmt_fast.diffusion import rng
from cmt_fast.objectives.batch import Batch, LossContext, StageContext, composed


class Drawn(NamedTuple):
    """Rows x_0 and their points x_t: (B, ...) each, at times t (B,); labels, drop: as of Batch."""

    x_t: Tensor
    x_0: Tensor
    t: Tensor
    labels: Tensor | None
    drop: Tensor | None


def draw(batch: Batch, config: Denoise, context: LossContext) -> Drawn:
    """ln t ~ N(mean, std^2), x_t = x_0 + t eps."""
    t = torch.exp(config.mean + config.std * context.random.gauss(rng.TIME, batch.sample)).to(batch.x_0.dtype)
    x_t, _ = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    return Drawn(x_t, batch.x_0, t, batch.labels, batch.drop)


def loss(net, drawn: Drawn, config: Denoise, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = lambda(t) ||D(x_0 + t eps, t) - x_0||^2,    lambda = (t^2 + s^2)/(t s)^2

    ln t ~ N(mean, std^2). Returns (B,).

    With uncertainty the network also gives u(t), and the loss is lambda/e^u ||D - x_0||^2 + N u, N numbers in x_0.
    """
    x_t, x_0, t, labels, drop = drawn
    s, n = stage.path.sigma_data, x_0[0].numel()
    weight = (t**2 + s**2) / (t * s) ** 2
    d, u = (
        net(x_t, t, None, labels, drop, None, True) if config.uncertainty else (net(x_t, t, None, labels, drop), None)
    )
    squared = (d - x_0).square().flatten(1).sum(1)
    loss = weight * squared if u is None else weight / u.exp() * squared + n * u
    return loss, {"mse": squared.detach() / n}


denoise = composed(draw, loss)
