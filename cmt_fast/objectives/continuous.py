"""Continuous-time consistency models (Lu & Song 2024, sCM): training from data (sCT) and by distillation (sCD).

The paper works in TrigFlow, x' = cos(theta) x_0 + sin(theta) z with z ~ N(0, s^2 I), where a network F gives the flow
map's end f = cos(theta) x' - s sin(theta) F. Our network is the VE denoiser, and the two are the same function: with
t = s tan(theta) and x = x' / cos(theta) the EDM coefficients are c_skip = cos^2, c_out = s sin, c_in = cos / s, so

    D(x, t) = cos(theta) x' + s sin(theta) F_edm(x'/s, ln(t)/4),    F = -F_edm.

What the loss needs of F is therefore read off D and one derivative of it, without ever dividing by sin(theta):

    F - F^-                                 = -(D - D^-) / c_out
    cos df/dtheta                           = sqrt(t^2 + s^2) dD/dt along dx/dt           (a tangent of that length)
    -cos^2 (s F^- - dx'/dtheta)             = cos^2 (D^- - x_hat) / sin,    x_hat = x - t dx/dt
    g = -cos^2 (s F^- - dx'/dtheta) - w cos sin (x' + s dF^-/dtheta)
      = (1 - w) cos^2 (D^- - x_hat) / sin + w cos df/dtheta.

x_hat is the clean row itself in sCT (dx/dt = eps) and the teacher's denoised image in sCD. c_noise stays EDM's ln(t)/4, so
that any VE network can start here; the paper's own c_noise = theta would be another network.

The paper's learned weighting, e^w(t) L - w(t) in place of a row's loss L, is there with `uncertainty`. It is the maximum
likelihood of a Gaussian with a learned variance, which EDM2 has in pre-training with the network's log variance u: w = -u, so a
network with that head serves both. At rest u(t) = ln E[L | t], and every noise has the same weighted loss. Without it, rows of a
normalised g have losses of nearly one size already, and the gradient is that of 1/D all along.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cmt_kernels import Dual
from torch import Tensor

from cmt_fast.config.schema import Scd, Sct
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.objectives.batch import Batch, LossContext, StageContext, composed


class Drawn(NamedTuple):
    """Rows x_0, their points x_t and noise eps: (B, ...) each, at times t (B,); labels, drop: as of Batch.

    share: (), float64, of the derivative's term in g at this step.
    """

    x_t: Tensor
    eps: Tensor
    x_0: Tensor
    t: Tensor
    share: Tensor
    labels: Tensor | None
    drop: Tensor | None


def draw(batch: Batch, config: Sct | Scd, context: LossContext) -> Drawn:
    """ln t ~ N(mean, std^2), x_t = x_0 + t eps."""
    t = torch.exp(config.mean + config.std * context.random.gauss(rng.TIME, batch.sample)).to(batch.x_0.dtype)
    x_t, eps = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    share = torch.full((), warm_up(context.nimg, config.warmup_nimg), dtype=torch.float64, device=x_t.device)
    return Drawn(x_t, eps, batch.x_0, t, share, batch.labels, batch.drop)


def warm_up(nimg: int, warmup_nimg: int) -> float:
    """The share of the derivative's term in g: min(1, nimg / warmup_nimg)."""
    return min(1.0, nimg / warmup_nimg) if warmup_nimg else 1.0


def loss_sct(net, drawn: Drawn, config: Sct, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = (1/D) ||F - sg(F) - g||^2,    g = n(df/dtheta along dx/dt = eps)

    dx/dt is conditional, of the data; n normalises a row; see the module. With uncertainty e^w(t) L - w(t). Returns (B,).
    """
    return _loss(net, drawn, config, stage, drawn.eps, drawn.x_0)


def loss_scd(net, drawn: Drawn, config: Scd, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = (1/D) ||F - sg(F) - g||^2,    g = n(df/dtheta along dx/dt = (x - D_teacher) / t)

    The teacher may be guided; n normalises a row; see the module. With uncertainty e^w(t) L - w(t). Returns (B,).
    """
    assert stage.teacher is not None
    x_t, t = drawn.x_t, drawn.t
    with torch.no_grad():
        x_hat = stage.teacher(x_t, t, t, drawn.labels)
    return _loss(net, drawn, config, stage, (x_t - x_hat) / column(t, x_t), x_hat)


def _loss(net, drawn: Drawn, config: Sct | Scd, stage: StageContext, x_dot: Tensor, x_hat: Tensor):
    x_t, t, share, s = drawn.x_t, drawn.t, drawn.share, stage.path.sigma_data
    length = torch.sqrt(t**2 + s**2)  # s / cos(theta)
    sin, cos = t / length, s / length
    along = Dual(x_t, column(length, x_t) * x_dot), Dual(t, length)
    given = (*along, None, drawn.labels, drawn.drop)
    d, u = net(*given, None, True) if config.uncertainty else (net(*given), None)
    with torch.no_grad():
        g = share * d.tangent + (1 - share) * column(cos**2 / sin, x_t) * (d.value - x_hat)
        size = column(g.flatten(1).norm(dim=1), g)
        if config.c is not None:
            g = g / (size + config.c)
    residual = (d.value - d.value.detach()) / column(s * sin, x_t) + g
    loss = residual.square().flatten(1).mean(1)
    loss = (1 / t if config.weight == "inverse_t" else torch.ones_like(t)) * loss
    scalars = {"mse": (d.value.detach() - x_hat).square().flatten(1).mean(1), "tangent": size.flatten()}
    if u is None:
        return loss, scalars
    return loss / u.exp() + u, scalars | {"log_variance": u.detach()}


sct, scd = composed(draw, loss_sct), composed(draw, loss_scd)
