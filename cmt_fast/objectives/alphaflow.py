"""AlphaFlow (Zhang et al. 2025): from trajectory flow matching through steps of a shortcut to MeanFlow.

MeanFlow's loss is a sum of two: trajectory flow matching, ||u - v||^2 at r < t, which pulls u to straight lines, and
consistency along the trajectory. The paper finds that their gradients point against one another, and begins with the first
alone. For a step of the share alpha of t - r along v,

    target = alpha v + (1 - alpha) u(z - alpha (t - r) v, r, t - alpha (t - r)),

alpha = 1 is trajectory flow matching, alpha = 1/2 a shortcut's step, and for alpha -> 0 the residual is alpha times MeanFlow's:

    u - target = alpha ( u - v + (t - r) du/dt ) + O(alpha^2),    du/dt along (v, 0, 1) in (z, r, t).

With the adaptive weight 1/(l + c), whose l has then alpha^2, gradients would grow as 1/alpha; so a step's loss has the factor
alpha. Below alpha = `clamp` the difference of two calls is mostly rounding, and the tangent form is taken: MeanFlow itself.

alpha = sigmoid(-gamma (x - 1/2)) falls with the progress x between `begin` and `end` of the stage, and within `clamp` of 0 or
1 it is that number. At alpha = 1 straight lines are at rest; between, the step along a single row's v biases the rest by
O(alpha); the last part is MeanFlow, at rest at the flow map. The three forms are three graphs of a step, told apart by name.

Published numbers that are defaults: gamma 25, clamp .005, from 0 to 1 of the stage (DiT-B/2; XL/2: 600,000 to 1,000,000 of
1,200,000 steps), half of rows r < t (B/2 with guidance: 3/4), rows with r = t at one draw of the law. With guidance the code
clips targets of MeanFlow and of XL/2 to [-4, 4]. The weight's l is a mean over numbers there, here a sum as in MeanFlow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from cmt_kernels import meanflow_loss
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import AlphaFlow
from cmt_fast.diffusion.paths import column
from cmt_fast.objectives import maps, meanflow, rules
from cmt_fast.objectives.batch import Batch, LossContext, StageContext

FLOW, STEP, TANGENT = "flow matching", "steps", "MeanFlow"  # alpha = 1, between, 0


class Drawn(NamedTuple):
    """Pairs of times; alpha: (), float64, of this step; form: its part of the schedule, by which graphs are told apart."""

    pair: meanflow.Drawn
    alpha: Tensor
    form: str


def check(config: AlphaFlow, setting: rules.Setting) -> None:
    """Raises ConfigError for a schedule that ends before it begins, or a velocity that is guided twice."""
    if config.begin >= config.end:
        raise ConfigError(
            f"{setting.key}.end: {config.end} is not above begin, {config.begin}; alpha falls between the two"
        )
    rules.guided_once(config, setting)


def draw(batch: Batch, config: AlphaFlow, context: LossContext) -> Drawn:
    """Two times a row, z = (1 - t) x_0 + t eps, rows with r < t first; and alpha."""
    pair, alpha = maps.draw(batch, config, context), schedule(context.progress, config)
    form = FLOW if alpha == 1 else STEP if alpha else TANGENT
    return Drawn(pair, torch.full((), alpha, dtype=torch.float64, device=pair.z.device), form)


def schedule(progress: float, config: AlphaFlow) -> float:
    """alpha at this progress of the stage: 1 before `begin`, 0 after `end`, a sigmoid between, clamped near both."""
    if progress < config.begin:
        return 1.0
    if progress > config.end:
        return 0.0
    x = (progress - config.begin) / (config.end - config.begin)
    alpha = 1 / (1 + math.exp(config.gamma * (x - 0.5)))
    return 0.0 if alpha < config.clamp else 1.0 if alpha > 1 - config.clamp else alpha


def forms(config: AlphaFlow) -> tuple[float, ...]:
    """Progress of a stage at which a step is of another form than at its beginning."""
    return (config.begin + config.end) / 2, 1.0


def loss(net, drawn: Drawn, config: AlphaFlow, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = alpha l / sg[(l + c)^p],    l = ||u - sg[alpha v + (1 - alpha) u(z - alpha (t - r) v, r, t - alpha (t - r))]||^2

    At alpha = 0 MeanFlow, without the factor; rows with r = t have l = ||u - v||^2, without it too. v = eps - x_0, guided as in
    `meanflow`. Returns (B,). Scalars: mse, alpha.
    """
    pair, alpha, form = drawn
    if form == TANGENT:
        loss, scalars = meanflow.loss_meanflow(net, pair, config, stage)
        return loss, scalars | {"alpha": alpha}
    pair = meanflow.with_teacher(pair, config, stage)
    z, _, t, r, labels, drop, _ = pair
    k = meanflow.tangent_rows(len(z), config.ratio)
    u = net(z, t, r, labels, drop)
    target = maps.guided(net, _instant(net, u.detach(), pair, k, config), pair, config)
    if form == STEP and k:
        target = torch.cat((_stepped(net, pair, alpha, target[:k], config), target[k:]))
    loss, squared = meanflow_loss(u, target, t, r, config.p, config.c)
    if form == STEP:
        loss = torch.cat((loss[:k] * alpha.to(loss.dtype), loss[k:]))
    return loss, {"mse": squared / z[0].numel(), "alpha": alpha}


@torch.no_grad()
def _instant(net, u: Tensor, pair: meanflow.Drawn, k: int, config: AlphaFlow) -> Tensor:
    """u(z, t, t | c), where guidance asks for it: rows from k on have it in the training forward. (B, ...)."""
    if not (k and config.kappa) or pair.labels is None:
        return u
    return torch.cat((net(pair.z[:k], pair.t[:k], pair.t[:k], *pair.first(k)).to(u.dtype), u[k:]))


@torch.no_grad()
def _stepped(net, pair: meanflow.Drawn, alpha: Tensor, v: Tensor, config: AlphaFlow) -> Tensor:
    """Targets of the first k rows: a step along v (k, ...), and the network from there to r. (k, ...)."""
    k = len(v)
    step = alpha.to(pair.t.dtype) * (pair.t - pair.r)[:k]
    onwards = net(maps.jump(pair.z[:k], v, step), pair.t[:k] - step, pair.r[:k], *pair.first(k))
    target = torch.lerp(onwards.to(v.dtype), v, column(alpha, v))
    return target if config.clip is None else target.clamp(-config.clip, config.clip)
