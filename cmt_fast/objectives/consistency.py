"""Consistency tuning from data (ECT, Geng et al. 2024) and by distillation (ECD): the post-training of VE models."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.config.schema import Ecd, Ect
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.diffusion.solvers import ve_step
from cmt_fast.objectives.batch import Batch, LossContext, StageContext, composed
from cmt_fast.objectives.distance import augmentation, distance


class Drawn(NamedTuple):
    """Points x_t with their noise eps: (B, ...) each, at times t, and the earlier times r: (B,) each.

    labels, drop: as of Batch; augmentation: of a perceptual distance, if it has one.
    """

    x_t: Tensor
    eps: Tensor
    t: Tensor
    r: Tensor
    labels: Tensor | None
    drop: Tensor | None
    augmentation: Any


def earlier_time(t: Tensor, q: float, k: float, b: float, stage: int = 0) -> Tensor:
    """ECT's mapping t -> r: r = max(0, t (1 - n(t)/q^(stage + 1))), n(t) = 1 + k sigmoid(-b t). t: (B,) -> (B,)."""
    n = 1 + k * torch.sigmoid(-b * t)
    return torch.clamp(t * (1 - n / q ** (stage + 1)), min=0)


def schedule_stage(progress: float, doublings: int) -> int:
    """The exponent's stage: 0 for a fixed q; else one more after each of doublings + 1 equal parts of the run."""
    return min(int(progress * (doublings + 1)), doublings)


def draw(batch: Batch, config: Ect | Ecd, context: LossContext) -> Drawn:
    """ln t ~ N(mean, std^2), x_t = x_0 + t eps, and r by the mapping of this part of the run."""
    t = torch.exp(config.mean + config.std * context.random.gauss(rng.TIME, batch.sample)).to(batch.x_0.dtype)
    r = earlier_time(t, config.q, config.k, config.b, schedule_stage(context.progress, config.doublings))
    x_t, eps = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    changed = augmentation(config.distance, context, x_t, batch.sample)
    return Drawn(x_t, eps, t, r, batch.labels, batch.drop, changed)


def loss_ect(net, drawn: Drawn, config: Ect, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = w(t, r) d(f(x_t, t), sg f(x_r, r)),    x_r = x_0 + r eps

    The same eps in x_t and x_r; f(x_0, 0) = x_0. Returns (B,).
    """
    return _loss(net, drawn, config, stage, earlier_point(drawn, config, stage))


def loss_ecd(net, drawn: Drawn, config: Ecd, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = w(t, r) d(f(x_t, t), sg f(x_r, r)),    x_r = x_t + step of the teacher's ODE from t to r

    One Euler or Heun step of the (guided) teacher. Returns (B,).
    """
    return _loss(net, drawn, config, stage, earlier_point(drawn, config, stage))


def earlier_point(drawn: Drawn, config: Ect | Ecd, stage: StageContext) -> Tensor:
    """x_r: (B, ...), the point at time r that x_t is compared with: under the same noise, or one step of the teacher away."""
    if not isinstance(config, Ecd):
        return drawn.x_t + column(drawn.r - drawn.t, drawn.x_t) * drawn.eps
    assert stage.teacher is not None
    return ve_step(stage.teacher, drawn.x_t, drawn.t, drawn.r, drawn.labels, config.step)


def outputs(net, drawn: Drawn, x_r: Tensor) -> tuple[Tensor, Tensor]:
    """f(x_t, t) and, without a gradient, f(x_r, r), which is x_r itself at r = 0. (B, ...) each."""
    x_t, _, t, r, labels, drop, _ = drawn
    with torch.no_grad():
        zero = r <= 0
        target = net(x_r, torch.where(zero, t, r), None, labels, drop)
        target = torch.where(column(zero, x_r).bool(), x_r, target)
    return net(x_t, t, None, labels, drop), target


def _loss(net, drawn: Drawn, config: Ect | Ecd, stage: StageContext, x_r: Tensor):
    f, target = outputs(net, drawn, x_r)
    loss = distance(f, target, config.distance, config.c, stage, drawn.augmentation)
    loss = loss * _weight(config.weight, drawn.t, drawn.r, stage)
    return loss, {"mse": (f.detach() - target).square().flatten(1).mean(1)}


def _weight(name: str, t: Tensor, r: Tensor, stage: StageContext) -> Tensor:
    """ "inverse_step" 1/(t - r), "snr" 1/t^2 + 1/s^2 = 1/c_out^2 (EDM2 form), "one". (B,)."""
    if name == "inverse_step":
        return 1 / (t - r)
    if name == "snr":
        return 1 / t**2 + 1 / stage.path.sigma_data**2
    return torch.ones_like(t)


ect, ecd = composed(draw, loss_ect), composed(draw, loss_ecd)
