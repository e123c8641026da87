"""MeanFlow (Geng et al. 2025) and improved MeanFlow: average velocities from the identity u = v - (t - r) du/dt.

Both regress u + (t - r) sg(du/dt) on the conditional (guided) v = eps - x_0. They differ in the direction that du/dt is
taken along: the same v in MeanFlow, the network's own u(z, t, t), which has no noise of a single row, in the improved.
Rows with r != t come first and their count is fixed, so tangents are carried only where they are
multiplied by something: `net` gets Duals of `k` rows and returns one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from cmt_kernels import Dual, meanflow_loss
from cmt_kernels.dual import value
from torch import Tensor

from cmt_fast.config.schema import IMeanFlow, MeanFlow, Trajectories
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.objectives import rules, times
from cmt_fast.objectives.batch import Batch, LossContext, StageContext, composed


class Drawn(NamedTuple):
    """Points z and their velocities v = eps - x_0: (B, ...) each, at times t >= r: (B,); labels, drop: as of Batch.

    guide: (B, 3), guidance scale and interval that a row's network is told, None where it is told none.
    """

    z: Tensor
    v: Tensor
    t: Tensor
    r: Tensor
    labels: Tensor | None
    drop: Tensor | None
    guide: Tensor | None = None

    def first(self, k: int) -> tuple[Tensor | None, Tensor | None]:
        """Labels and drop of the first k rows."""
        labels, drop = (None if x is None else x[:k] for x in (self.labels, self.drop))
        return labels, drop


def draw(batch: Batch, config: MeanFlow | IMeanFlow, context: LossContext) -> Drawn:
    """Two times a row, z = (1 - t) x_0 + t eps; the rows with r != t come first."""
    k = tangent_rows(len(batch.x_0), config.ratio)
    t, r = draw_times(batch.sample, k, config, context, batch.x_0.dtype)
    z, v = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    return Drawn(z, v, t, r, batch.labels, batch.drop, told(batch.sample, k, config, context, batch.x_0.dtype))


check = rules.guided_once


def told(
    sample: Tensor, k: int, config: MeanFlow | IMeanFlow, context: LossContext, dtype: torch.dtype
) -> Tensor | None:
    """Guidance scale and interval that the network is told in each row, (B, 3); None where it is told none.

    The scale's density falls as 1/omega^beta in [1, omega_max]; the interval begins uniformly in [0, 1/2] and ends in [1/2, 1],
    and is whole in rows with r = t, from k on.
    """
    if getattr(config, "omega_max", 1.0) == 1:
        return None
    shares = [context.random.uniform(s, sample) for s in (rng.GUIDANCE, rng.GUIDANCE_LOW, rng.GUIDANCE_HIGH)]
    return guides(shares, torch.arange(len(sample), device=sample.device) >= k, config).to(dtype)


def guides(shares: Sequence[Tensor], everywhere: Tensor, law: IMeanFlow | Trajectories) -> Tensor:
    """Scale and interval (B, 3) from three uniform draws (B,) each; `everywhere`: (B,) bool, rows whose interval is whole."""
    share, low, high = shares
    low, high = torch.where(everywhere, 0.0, low / 2), torch.where(everywhere, 1.0, 0.5 + high / 2)
    return torch.stack((scale_of(share, law.omega_max, law.omega_beta), low, high), dim=1)


def scale_of(share: Tensor, most: float, beta: float) -> Tensor:
    """The scale in [1, most] below which a share in [0, 1) of the density 1/omega^beta lies. (B,) -> (B,)."""
    if beta == 1:
        return torch.exp(share * math.log(most))
    power = 1 - beta
    return (1 + share * (most**power - 1)) ** (1 / power)


def loss_meanflow(net, drawn: Drawn, config: MeanFlow, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = l / sg[(l + c)^p],    l = ||u - sg[v - (t - r) du/dt]||^2,    du/dt along v = eps - x_0

    Returns (B,). `velocity: teacher` takes v of the teacher.

    Guidance (MeanFlow, sec. 4.2 and appendix): v <- omega v + kappa u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | null)
    inside [guide_t_min, guide_t_max] on rows with labels, of effective scale omega / (1 - kappa). Rows with r = t
    reuse the training forward as u(z, t, t | c). A network with dropout has it in these calls too (published: without).
    """
    return _regress(net, with_teacher(drawn, config, stage), config, own=False)


def loss_improved(net, drawn: Drawn, config: IMeanFlow, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = l / sg[(l + c)^p],    l = ||u + (t - r) sg(du/dt) - v||^2,    du/dt along u(z, t, t)

    Returns (B,).

    Guidance enters v as in `meanflow`. There is no second head for v: u(z, t, t) is it, and the rows with r = t are its
    loss. A row whose label is dropped follows the null class's own velocity (published, Lyy-iiis/imeanflow `guidance_fn` before
    `cond_drop`: that of the label it had, which is not the velocity of the row's own u). In all else the loss is the
    published one, and so is that of `meanflow`: tests/fixtures/peers.

    With `head` v is that of the network's auxiliary head instead, trained by ||v_head - v||^2 with the same weight beside it.
    With `omega_max` above 1 the network is told a scale omega and an interval in each row, and the target is the velocity that is
    guided by its own, v + (1 - 1/omega) (v(c) - v(null)), where t is in the interval and the row has its label.
    """
    drawn = with_teacher(drawn, config, stage)
    if config.head or drawn.guide is not None:
        return _with_inputs(net, drawn, config)
    return _regress(net, drawn, config, own=True)


def with_teacher(drawn: Drawn, config: MeanFlow | IMeanFlow, stage: StageContext) -> Drawn:
    """With the teacher's velocity in the place of the data's, where that is asked for (MF-RAE's distillation): it has no noise of
    a single row. A row whose label is dropped has the teacher's without a label: its labels are the null class already."""
    if config.velocity == "data":
        return drawn
    return drawn._replace(v=stage.velocity(drawn.z, drawn.t, drawn.labels))


def _with_inputs(net, drawn: Drawn, config: IMeanFlow) -> tuple[Tensor, dict[str, Tensor]]:
    """Improved MeanFlow whose velocity is a head's, or whose guidance is an input of the network, or both."""
    z, v, t, r, labels, drop, guide = drawn
    k = tangent_rows(len(z), config.ratio)
    with torch.no_grad():
        if guide is None:
            direction = velocity(net, (z[:k], t[:k], *drawn.first(k)), config, None)
        else:
            assert labels is not None
            omega = guide[:, 0].masked_fill((t < guide[:, 1]) | (t > guide[:, 2]), 1.0)
            own = velocity(net, (z, t, labels, drop), config, whole(omega))
            dropped = torch.ones_like(labels, dtype=torch.bool)
            null = velocity(net, (z, t, labels, dropped), config, whole(torch.ones_like(omega)))
            share = 1 - 1 / omega if drop is None else (1 - 1 / omega).masked_fill(drop, 0.0)
            v, direction = v + column(share, v) * (own - null).to(v.dtype), own[:k]
    found = _moving(net, drawn, direction, None, config.head, guide)
    u, head = found if config.head else (found, None)
    loss, squared = meanflow_loss(u, v, t, r, config.p, config.c)
    scalars = {"mse": squared / z[0].numel()}
    if head is None:
        return loss, scalars
    missed = (head - v).square().flatten(1).sum(1)
    scalars["head_mse"] = missed.detach() / z[0].numel()
    return loss + missed / (missed.detach() + config.c) ** config.p, scalars


def velocity(net, rows: tuple, config: IMeanFlow, guide: Tensor | None) -> Tensor:
    """The network's own velocity of rows (z, t, labels, drop): that of its head, or u(z, t, t). (B, ...)."""
    z, t, labels, drop = rows
    found = net(z, t, t, labels, drop, None, config.head, guide)
    return found[1] if config.head else found


def whole(omega: Tensor) -> Tensor:
    """These scales at all times, as a network is told them. (B,) -> (B, 3)."""
    return torch.stack((omega, torch.zeros_like(omega), torch.ones_like(omega)), dim=1)


def _regress(net, drawn: Drawn, config: MeanFlow | IMeanFlow, own: bool):
    z, v, t, r, labels, drop = drawn[:6]
    k = tangent_rows(len(z), config.ratio)
    guide = guidance_mask(drawn, config)
    with torch.no_grad():
        null = None if guide is None else net(z, t, t, labels, torch.ones_like(guide))
        mixed = guide is not None and config.kappa
        cond = net(z[:k], t[:k], t[:k], *drawn.first(k)) if k and (own or mixed) else None
        head = v[:k] if guide is None else _guided(v[:k], cond, null[:k], guide[:k], config)
        direction = cond if own and k else head
    u = _moving(net, drawn, direction)
    tail = v[k:] if guide is None else _guided(v[k:], value(u)[k:].detach(), null[k:], guide[k:], config)
    loss, squared = meanflow_loss(u, torch.cat((head, tail)), t, r, config.p, config.c)
    return loss, {"mse": squared / z[0].numel()}


def _moving(net, drawn: Drawn, direction: Tensor, *more: Any) -> Any:
    """The network, its first rows moving along (direction (k, ...), 1, 0) in (z, t, r); more: what else it is called with."""
    z, _, t, r, labels, drop, _ = drawn
    if not (k := len(direction)):
        return net(z, t, r, labels, drop, *more)
    along = Dual(z, direction.to(z.dtype)), Dual(t, torch.ones_like(t[:k])), Dual(r, torch.zeros_like(r[:k]))
    return net(*along, labels, drop, *more)


def tangent_rows(rows: int, ratio: float) -> int:
    """How many of a batch's rows have r != t: round(ratio rows)."""
    return round(ratio * rows)


def draw_times(
    sample: Tensor, k: int, config: MeanFlow | IMeanFlow, context: LossContext, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Two draws a row by the law (times.py), t the later and r the earlier; rows from k on have r = t, the later too. (B,), (B,).

    As published (Geng et al. 2025; Gsunshine/meanflow `sample_tr`, the same in its improved successor): rows with r = t are
    noisier than a single draw would make them. Their t has the law F^2, F that of one draw.
    """
    a, b = (times.drawn(stream, sample, config, context, dtype) for stream in (rng.TIME, rng.TIME_R))
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    return t, torch.cat((r[:k], t[k:]))


def guidance_mask(drawn: Drawn, config: MeanFlow | IMeanFlow) -> Tensor | None:
    """(B,) bool: rows whose target is guided; None when omega, kappa ask for none or there are no labels."""
    if (config.omega == 1.0 and config.kappa == 0.0) or drawn.labels is None:
        return None
    t = drawn.t
    kept = torch.ones_like(t, dtype=torch.bool) if drawn.drop is None else ~drawn.drop
    return kept & (t >= config.guide_t_min) & (t <= config.guide_t_max)


def _guided(v: Tensor, cond: Tensor | None, null: Tensor, guide: Tensor, config: MeanFlow | IMeanFlow) -> Tensor:
    """v of guided rows becomes omega v + kappa cond + (1 - omega - kappa) null. (k, ...)."""
    mixed = config.omega * v + (1 - config.omega - config.kappa) * null
    if cond is not None and config.kappa:
        mixed = mixed + config.kappa * cond
    return torch.where(column(guide, v).bool(), mixed, v)


meanflow, improved = composed(draw, loss_meanflow), composed(draw, loss_improved)
