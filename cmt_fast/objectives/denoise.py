"""EDM denoising (Karras et al. 2022, eq. 3 and table 1; 2024, EDM2, eq. 21), the pre-training of VE models."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.config.schema import Denoise
from cmt_fast.diffusion import rng
from cmt_fast.objectives.batch import Batch, LossContext


def denoise(net, batch: Batch, config: Denoise, context: LossContext) -> tuple[Tensor, dict[str, Tensor]]:
    """lambda(t) ||D(x_0 + t eps, t) - x_0||^2, ln t ~ N(mean, std^2), lambda = (t^2 + s^2)/(t s)^2. Returns (B,).

    With uncertainty the network also gives u(t), and the loss is lambda/e^u ||D - x_0||^2 + N u, N numbers in x_0.
    """
    t = torch.exp(config.mean + config.std * context.random.gauss(rng.TIME, batch.sample)).to(batch.x_0.dtype)
    x_t, _ = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    s, n = context.path.sigma_data, batch.x_0[0].numel()
    weight = (t**2 + s**2) / (t * s) ** 2
    if config.uncertainty:
        d, u = net(x_t, t, None, batch.labels, batch.drop, None, True)
    else:
        d, u = net(x_t, t, None, batch.labels, batch.drop), None
    squared = (d - batch.x_0).square().flatten(1).sum(1)
    loss = weight * squared if u is None else weight / u.exp() * squared + n * u
    return loss, {"mse": squared.detach() / n}
