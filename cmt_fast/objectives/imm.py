"""Inductive moment matching (Zhou et al. 2025, arXiv 2503.07565) on linear flow: sets of samples with one distribution.

A flow map from t to s and one from an earlier r to s end in the same distribution, that of z_s. So M samples that jump from t are
compared, as a set, with M that jump from r, by the maximum mean discrepancy under a Laplace kernel. The times (s, r, t) are one
set's; noise, data and labels, dropped or not, are each row's own. Where r falls on s the target is the point z_s of the data's
path itself, which holds the induction to the data.

In the paper's Euler-FM form the jump is z_t - (t - s) sigma_d G with data and noise of deviation sigma_d; here the noise has
deviation 1 and u is the average velocity of MeanFlow, so weights are the paper's in units of sigma_d and networks of the two
objectives are each other's starts. There are no tangents. The loss is as small as 1/D in D numbers a row, as published: gradients
are of that size, which Adam does not see, but `grad_clip_norm` does.

The decrement of eta needs t_max < 1. Samplers begin at t = 1, published ones at t_max = 0.994: that much further the network is
held by mid-training and its anchor alone, or extrapolates.

Both jumps are computed in the stage's precision, and what 16 bits round off of y - y~ is not measured: `rounding` sorts
rows one by one, which would break sets, and is that of ect and ecd alone. Small decrements are safer in tf32 or fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Imm
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.objectives import rules, sets
from cmt_fast.objectives.batch import Batch, LossContext, StageContext, composed

NEAR = 1e-8  # the paper's epsilon of the kernel: nearer samples have no gradient
SHORT = 1e-6  # a shorter jump is weighed like this one: s = t is a row in millions, and 1/(t - s) would be infinite


class Drawn(NamedTuple):
    """Points z_t and z_r: (B, ...), at times t >= r >= s: (B,), one triple a set; labels, drop: as of Batch."""

    z_t: Tensor
    z_r: Tensor
    t: Tensor
    r: Tensor
    s: Tensor
    labels: Tensor | None
    drop: Tensor | None


def check(config: Imm, setting: rules.Setting) -> None:
    """Raises ConfigError for sets that do not fill a batch, or that hold nothing to compare."""
    rules.whole_sets(config, setting)
    if config.group == 1 and not config.diagonal:
        raise ConfigError(
            f"{setting.key}.diagonal: false leaves sets of 1 row nothing to compare with; take group 2 or more"
        )


def draw(batch: Batch, config: Imm, context: LossContext) -> Drawn:
    """t ~ U(0, t_max) and s ~ U(0, t) a set; z_t = (1 - t) x_0 + t eps, z_r on the line from x_0 to it (DDIM)."""
    first = sets.firsts(batch.sample, config.group)
    t = config.t_max * context.random.uniform(rng.TIME, first)
    s = t * context.random.uniform(rng.TIME_R, first)
    r = earlier_time(s, t, config)
    t, r, s = (sets.spread(x, config.group) for x in (t, r, s))
    back = column((t - r) / t, batch.x_0)  # alpha_r - alpha_t sigma_r / sigma_t = 1 - r / t
    t, r, s = (x.to(batch.x_0.dtype) for x in (t, r, s))
    z_t, _ = context.path.point(batch.x_0, t, context.random.key(rng.NOISE), batch.sample)
    z_r = z_t + back * (batch.x_0 - z_t)
    return Drawn(z_t, z_r, t, r, s, batch.labels, batch.drop)


def loss(net, drawn: Drawn, config: Imm, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = w(t) 1/M^2 sum_jk [ k(y_j, y_k) + k(y~_j, y~_k) - 2 k(y_j, y~_k) ]
    y = z_t - (t - s) u(z_t, s, t),    y~ = sg[ z_r - (r - s) u(z_r, s, r) ],    k(x, y) = exp( -||x - y|| / (D (t - s)) )

    D numbers a row; a row j has its part of the sum over k. Without `diagonal` the sum is over j != k and M (M - 1) pairs:
    then the mean gradient is zero at the answer. With it, as published, a row is drawn to its own target by a unit vector, whose
    mean is not zero where targets scatter unevenly: a bias that falls as 1/M. Returns (B,).
    """
    z_t, z_r, t, r, s, labels, drop = drawn
    with torch.no_grad():
        target = z_r - column(r - s, z_r) * net(z_r, r, s, labels, drop)
    y = z_t - column(t - s, z_t) * net(z_t, t, s, labels, drop)
    a, b = (sets.gathered(x.flatten(1), config.group) for x in (y, target))
    span = (t - s).clamp(min=SHORT)
    scale = sets.gathered(span, config.group)[:, :, None] * a.shape[2]
    k = lambda x, y: torch.exp(-distances(x, y) / scale)
    terms, pairs = k(a, a) + k(b, b) - 2 * k(a, b), config.group
    if not config.diagonal:
        terms, pairs = terms * (1 - torch.eye(config.group, dtype=terms.dtype, device=terms.device)), pairs - 1
    rows = sets.scattered(terms.sum(2) / pairs)
    return weight(t, config) * rows, {"mse": (y.detach() - target).square().flatten(1).mean(1)}


def earlier_time(s: Tensor, t: Tensor, config: Imm) -> Tensor:
    """r = max(s, eta^-1(eta(t) - eta_max / 2^k)), eta = sigma/alpha = t / (1 - t). s, t: (S,) -> (S,)."""
    eta = t / (1 - t) - config.eta_max / 2**config.k
    return torch.maximum(s, eta / (1 + eta.clamp(min=0)))


def weight(t: Tensor, config: Imm) -> Tensor:
    """w(t) = 1/2 sigmoid(b - l) (-dl/dt) alpha^a / (alpha^2 + sigma^2), l = 2 ln(alpha / sigma) the log-SNR. (B,).

    With alpha = 1 - t, sigma = t that is t alpha^(a-1) / ((t^2 + e^-b alpha^2) (alpha^2 + t^2)), finite at t = 0.
    """
    alpha = 1 - t
    shifted = t.square() + math.exp(-config.b) * alpha.square()
    return t * alpha ** (config.a - 1) / (shifted * (alpha.square() + t.square()))


def distances(x: Tensor, y: Tensor) -> Tensor:
    """max(||x_j - y_k||, NEAR), by differences: products would lose what near samples differ in. (S, M, D) each -> (S, M, M)."""
    squared = torch.stack([(x - y[:, k : k + 1]).square().sum(2) for k in range(y.shape[1])], dim=2)
    near = squared <= NEAR**2
    return squared.masked_fill(near, 1.0).sqrt().masked_fill(near, NEAR)


imm = composed(draw, loss)
