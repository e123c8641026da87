"""Lagrangian flow map matching: the end of a jump moves with the ODE (Boffi, Albergo and Vanden-Eijnden 2024 and 2025).

With X_{t->r}(z) = z - (t - r) u(z, r, t), where a jump from (z, t) ends is a curve in r, and it is the ODE's own where

    dX_{t->r}(z)/dr = u - (t - r) du/dr = v(X_{t->r}(z), r),    du/dr at fixed z and t.

No derivative in z is needed, so there is no Jacobian of the network in z, which is what makes Eulerian losses restless. What is
needed besides is v where the jump ends. With a teacher that is the teacher's velocity: Lagrangian map distillation (LMD, 2024).
Without one it is the network's own u(z, r, r), which the rows with r = t learn from data: Lagrangian self-distillation (LSD,
2025). With the data's v guided in those rows (omega, kappa), the whole map is that of the guided velocity.

The target, v(X) + (t - r) du/dr, is held: u alone has a gradient. At the answer every row with r < t has residual 0. Near it,
let u be wrong by e, a function of the span s = t - r at some (z, t). Then the residual is d(s e)/ds + grad v . (s e), and
following it de/dtau = -(1 + s grad v) e along ds/dtau = s. So errors decay as they move out from short spans to long ones, and
nothing moves back: what is learned at s = 0, where u is v, decides.

As published: rows with r = t are 3/4 of the batch, times are uniform, X and v in the target are held. Otherwise: the published
code differentiates through du/dr too, a backward pass through a forward derivative, which tangents here do not have
(`kernels/cmt_kernels/dual.py`); the rest is the same, the way there is not. It weighs pairs of times by a learned log variance
of (t, r); here rows weigh alike, or by MeanFlow's adaptive weight, `p` and `c`. That one did worse: on digits from a mid-trained
network (20,000 images, one seed) 30.6 for 25.1 at p = 0 with a teacher, 33.6 for 26.9 without.
"""

from __future__ import annotations

import torch
from cmt_kernels import Dual, meanflow_loss
from cmt_kernels.dual import value
from torch import Tensor

from cmt_fast.config.schema import Lagrangian
from cmt_fast.objectives import maps, rules
from cmt_fast.objectives.batch import StageContext
from cmt_fast.objectives.meanflow import Drawn, tangent_rows

draw = maps.draw


def check(config: Lagrangian, setting: rules.Setting) -> None:
    """Raises ConfigError for a velocity that is guided twice, or that no row learns."""
    rules.guided_once(config, setting)
    if config.velocity != "teacher":
        rules.velocity_is_learned(config, setting)


def loss(net, drawn: Drawn, config: Lagrangian, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = l / sg[(l + c)^p],    l = ||u - sg[v(X, r) + (t - r) du/dr]||^2,    X = z - (t - r) u(z, r, t)

    v the network's own u(., r, r) or the (guided) teacher's velocity; rows with r = t have l = ||u - v||^2, v the data's
    eps - x_0 or the teacher's. Returns (B,).
    """
    z, _, t, r, labels, drop, _ = drawn
    k, first = tangent_rows(len(z), config.ratio), drawn.first
    u, head = net(z, t, r, labels, drop) if not k else _along_the_end(net, drawn, k), z[:0]
    tail = maps.instant(net, value(u).detach(), drawn, k, config, stage)
    if k:
        x, r_k = maps.jump(z[:k], value(u)[:k].detach(), (t - r)[:k]), r[:k]
        if config.velocity == "teacher":
            head = stage.velocity(x, r_k, first(k)[0])
        else:
            with torch.no_grad():
                head = net(x, r_k, r_k, *first(k)).to(z.dtype)
    loss, squared = meanflow_loss(u, torch.cat((head, tail)), t, r, config.p, config.c)
    return loss, {"mse": squared / z[0].numel()}


def _along_the_end(net, drawn: Drawn, k: int) -> Dual:
    """u with -du/dr of the first k rows, in which u = v(X, r) - (t - r) (-du/dr) has MeanFlow's form."""
    z, _, t, r, labels, drop, _ = drawn
    still = Dual(z, torch.zeros_like(z[:k])), Dual(t, torch.zeros_like(t[:k]))
    return net(*still, Dual(r, -torch.ones_like(r[:k])), labels, drop)
