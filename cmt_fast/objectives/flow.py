"""Flow matching on the linear path (Lipman et al. 2023; SiT), the pre-training of MeanFlow models."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.config.schema import Flow
from cmt_fast.diffusion import rng
from cmt_fast.objectives.batch import Batch, LossContext


def flow(net, batch: Batch, config: Flow, context: LossContext) -> tuple[Tensor, dict[str, Tensor]]:
    """||u(z_t, t, t) - (eps - x_0)||^2, t ~ logit-normal(mean, std). Returns (B,)."""
    t = torch.sigmoid(config.mean + config.std * context.random.gauss(rng.TIME, batch.sample)).to(batch.x_0.dtype)
    z_t, v = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    squared = (net(z_t, t, t, batch.labels, batch.drop) - v).square().flatten(1).sum(1)
    return squared, {"mse": squared.detach() / batch.x_0[0].numel()}
