"""Progressive self-distillation: a jump is two jumps (Boffi et al. 2025, PSD; Guo et al. 2025, SplitMeanFlow).

The semigroup of flow maps, X_{t->r} = X_{m->r} o X_{t->m} for r <= m <= t, says of average velocities that distances add up:

    (t - r) u(z, r, t) = (t - m) u(z, m, t) + (m - r) u(X_{t->m}(z), r, m).

With m = r + h (t - r) that is u = (1 - h) u_1 + h u_2, u_1 of the jump to m and u_2 of the one from there. Both are held and u
is regressed on their mean: no derivative, three calls of the network. As h -> 1, m -> t, it becomes MeanFlow's identity, and
as h -> 0 the Lagrangian equation. m is uniform between r and t (PSD-U, SplitMeanFlow) or in the middle (PSD-M).

The flow map of any velocity is at rest here. Which it is, the rows with r = t say: u(z, t, t) = v of the data, guided by omega
and kappa or not, or the (guided) teacher's, as SplitMeanFlow distils. Where short jumps are right, jumps of twice the length
become right next; the error of the pieces adds up.

As published: rows with r = t are 3/4 of the batch, times are uniform, the two jumps are by the weights as they are. Otherwise: a
learned weight of (t, r) in Boffi et al.; here rows weigh alike. MeanFlow's adaptive weight, `p` and `c`, lets a row that is
nearly at rest weigh 1/c, and all maps of all velocities are at rest: with p = 1 u ran off within 20,000 images of digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cmt_kernels import meanflow_loss
from torch import Tensor

from cmt_fast.config.schema import Semigroup
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.objectives import maps, meanflow, rules
from cmt_fast.objectives.batch import Batch, LossContext, StageContext
from cmt_fast.objectives.meanflow import tangent_rows


class Drawn(NamedTuple):
    """Pairs of times; h: (B,) in (0, 1), where m is between r and t, of use in rows with r < t."""

    pair: meanflow.Drawn
    h: Tensor


def check(config: Semigroup, setting: rules.Setting) -> None:
    """Raises ConfigError for a velocity that is guided twice, or that no row learns."""
    rules.guided_once(config, setting)
    rules.velocity_is_learned(config, setting)


def draw(batch: Batch, config: Semigroup, context: LossContext) -> Drawn:
    """Two times a row and one between them, z = (1 - t) x_0 + t eps; rows with r < t first."""
    pair = maps.draw(batch, config, context)
    h = context.random.uniform(rng.MIDDLE, batch.sample).to(pair.t.dtype)
    return Drawn(pair, torch.full_like(h, 0.5) if config.split == "middle" else h)


def loss(net, drawn: Drawn, config: Semigroup, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = l / sg[(l + c)^p],    l = ||u - sg[(1 - h) u(z, m, t) + h u(X_{t->m}(z), r, m)]||^2,    m = r + h (t - r)

    Rows with r = t have l = ||u - v||^2, v the data's eps - x_0 or the teacher's. Returns (B,).
    """
    z, _, t, r, labels, drop, _ = pair = drawn.pair
    k = tangent_rows(len(z), config.ratio)
    head = two_jumps(net, pair, drawn.h[:k], k) if k else z[:0]
    u = net(z, t, r, labels, drop)
    target = torch.cat((head, maps.instant(net, u.detach(), pair, k, config, stage)))
    loss, squared = meanflow_loss(u, target, t, r, config.p, config.c)
    return loss, {"mse": squared / z[0].numel()}


@torch.no_grad()
def two_jumps(net, pair: meanflow.Drawn, h: Tensor, k: int) -> Tensor:
    """The average velocity of the first k rows from t to m and from there to r. h: (k,) -> (k, ...)."""
    z, t, r, first = pair.z[:k], pair.t[:k], pair.r[:k], pair.first(k)
    m = r + h * (t - r)
    u_1 = net(z, t, m, *first).to(z.dtype)
    u_2 = net(maps.jump(z, u_1, t - m), m, r, *first).to(z.dtype)
    return torch.lerp(u_1, u_2, column(h, z))
