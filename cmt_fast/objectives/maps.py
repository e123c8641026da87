"""What objectives of flow maps share on the linear path: pairs of times, rows with r = t, jumps.

A flow map X_{t->r} takes a point of the ODE dz/dt = v(z, t) from t to r. Written with an average velocity,

    X_{t->r}(z) = z - (t - r) u(z, r, t),    u(z, t, t) = v(z, t),

it begins right, X_{t->t}(z) = z, whatever u is. Each of three equations, at all z, r and t, makes it the flow map of v:

    dX_{t->r}(z)/dr = v(X_{t->r}(z), r)             the end moves with the ODE: Lagrangian      lagrangian.py
    d/dt X_{t->r}(z_t) = 0 where dz_t/dt = v        the start does: Eulerian                    meanflow.py, ayf.py
    X_{t->r} = X_{m->r} o X_{t->m}                  a jump is two jumps: semigroup              semigroup.py, shortcut.py

None says what v is: the flow map of any other velocity obeys them too. So the rows of a batch are of two kinds. The first ones
have r < t and an equation to obey; the others have r = t and learn v, from data by flow matching or from a teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.objectives import meanflow, times
from cmt_fast.objectives.batch import Batch, LossContext, StageContext
from cmt_fast.objectives.meanflow import Drawn


def draw(batch: Batch, config: Any, context: LossContext) -> Drawn:
    """Two times a row, z = (1 - t) x_0 + t eps; the share `ratio` of rows with r < t comes first."""
    k = meanflow.tangent_rows(len(batch.x_0), config.ratio)
    t, r = draw_times(batch.sample, k, config, context, batch.x_0.dtype)
    z, v = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    return Drawn(z, v, t, r, batch.labels, batch.drop)


def draw_times(sample: Tensor, k: int, config: Any, context: LossContext, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two draws a row by the law, t the later and r the earlier; rows from k on have t = r, one draw. (B,), (B,).

    So have the codes of Boffi et al. 2025 (uniform) and AlphaFlow (logit-normal); MeanFlow's rows with r = t take the later.
    """
    a, b = (times.drawn(stream, sample, config, context, dtype) for stream in (rng.TIME, rng.TIME_R))
    later, earlier = torch.maximum(a, b)[:k], torch.minimum(a, b)[:k]
    return torch.cat((later, a[k:])), torch.cat((earlier, a[k:]))


def jump(z: Tensor, u: Tensor, span: Tensor) -> Tensor:
    """X_{t->t-span}(z) = z - span u. z, u: (B, ...), span: (B,) -> (B, ...)."""
    return z - column(span, z) * u.to(z.dtype)


def instant(net: Any, u: Tensor, drawn: Drawn, k: int, config: Any, stage: StageContext) -> Tensor:
    """What rows from k on, of r = t, learn as v: the data's, guided as in MeanFlow, or the teacher's. (B - k, ...), no gradient.

    u: (B, ...), the training forward, which is u(z, t, t) of these rows.
    """
    if config.velocity == "teacher":
        return stage.velocity(drawn.z[k:], drawn.t[k:], None if drawn.labels is None else drawn.labels[k:])
    return guided(net, u, drawn, config)[k:]


@torch.no_grad()
def guided(net: Any, cond: Tensor, drawn: Drawn, config: Any) -> Tensor:
    """v of all rows, guided as in MeanFlow with cond (B, ...) for u(z, t, t | c). (B, ...), no gradient."""
    guide = meanflow.guidance_mask(drawn, config)
    if guide is None:
        return drawn.v
    null = net(drawn.z, drawn.t, drawn.t, drawn.labels, torch.ones_like(guide))
    return meanflow._guided(drawn.v, cond, null, guide, config)
