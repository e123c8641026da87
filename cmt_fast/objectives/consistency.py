"""Consistency tuning from data (ECT, Geng et al. 2024) and by distillation (ECD): the post-training of VE models."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.config.schema import Ecd, Ect
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.diffusion.solvers import ve_step
from cmt_fast.objectives.batch import Batch, LossContext
from cmt_fast.objectives.distance import distance


def earlier_time(t: Tensor, q: float, k: float, b: float, stage: int = 0) -> Tensor:
    """ECT's mapping t -> r: r = max(0, t (1 - n(t)/q^(stage + 1))), n(t) = 1 + k sigmoid(-b t). t: (B,) -> (B,)."""
    n = 1 + k * torch.sigmoid(-b * t)
    return torch.clamp(t * (1 - n / q ** (stage + 1)), min=0)


def schedule_stage(progress: float, doublings: int) -> int:
    """The exponent's stage: 0 for a fixed q; else one more after each of doublings + 1 equal parts of the run."""
    return min(int(progress * (doublings + 1)), doublings)


def ect(net, batch: Batch, config: Ect, context: LossContext) -> tuple[Tensor, dict[str, Tensor]]:
    """w(t, r) d(f(x_t, t), sg f(x_r, r)) with the same eps in x_t and x_r; f(x_0, 0) = x_0. Returns (B,)."""
    t, r, x_t, eps = _draw(batch, config, context)
    x_r = x_t + column(r - t, x_t) * eps
    return _loss(net, batch, config, context, t, r, x_t, x_r)


def ecd(net, batch: Batch, config: Ecd, context: LossContext) -> tuple[Tensor, dict[str, Tensor]]:
    """ECT with x_r one Euler or Heun step of the (guided) teacher's ODE from x_t. Returns (B,)."""
    t, r, x_t, _ = _draw(batch, config, context)
    x_r = ve_step(context.teacher, x_t, t, r, batch.labels, config.step)
    return _loss(net, batch, config, context, t, r, x_t, x_r)


def _draw(batch: Batch, config: Ect | Ecd, context: LossContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = torch.exp(config.mean + config.std * context.random.gauss(rng.TIME, batch.sample)).to(batch.x_0.dtype)
    r = earlier_time(t, config.q, config.k, config.b, schedule_stage(context.progress, config.doublings))
    x_t, eps = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    return t, r, x_t, eps


def _loss(net, batch: Batch, config: Ect | Ecd, context: LossContext, t: Tensor, r: Tensor, x_t: Tensor, x_r: Tensor):
    with torch.no_grad():
        zero = r <= 0
        target = net(x_r, torch.where(zero, t, r), None, batch.labels, batch.drop)
        target = torch.where(column(zero, x_r).bool(), x_r, target)
    f = net(x_t, t, None, batch.labels, batch.drop)
    loss = distance(f, target, config.distance, config.c, context, batch.sample) * _weight(config.weight, t, r, context)
    return loss, {"mse": (f.detach() - target).square().flatten(1).mean(1)}


def _weight(name: str, t: Tensor, r: Tensor, context: LossContext) -> Tensor:
    """ "inverse_step" 1/(t - r), "snr" 1/t^2 + 1/s^2 = 1/c_out^2 (EDM2 form), "one". (B,)."""
    if name == "inverse_step":
        return 1 / (t - r)
    if name == "snr":
        return 1 / t**2 + 1 / context.path.sigma_data**2
    return torch.ones_like(t)
