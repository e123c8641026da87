"""Consistency mid-training (arXiv 2509.24526): regress points of the teacher's trajectory to where it leads."""

from __future__ import annotations

from torch import Tensor

from cmt_fast.config.schema import CmtCm, CmtMf
from cmt_fast.objectives.batch import LossContext, Points
from cmt_fast.objectives.distance import distance


def cmt_cm(net, points: Points, config: CmtCm, context: LossContext) -> tuple[Tensor, dict[str, Tensor]]:
    """CMT for consistency models: d(f(x_t, t), x_end), over the solver's nodes, weight 1, no stop-grad. Returns (B,).

    A distance of features takes the endpoint's from the points where they have them.
    """
    f = net(points.x, points.t, None, points.labels, points.drop)
    loss = distance(f, points.x_r, config.distance, config.c, context, points.sample, points.kept)
    return loss, {"mse": (f.detach() - points.x_r).square().flatten(1).mean(1)}


def cmt_mf(net, points: Points, config: CmtMf, context: LossContext) -> tuple[Tensor, dict[str, Tensor]]:
    """CMT for flow maps: ||u(x_t, r, t) - (x_t - x_r)/(t - r)||^2 with the solver's own times t > r. Returns (B,)."""
    u = net(points.x, points.t, points.r, points.labels, points.drop)
    span = (points.t - points.r).view(-1, *[1] * (points.x.ndim - 1))
    squared = (u - (points.x - points.x_r) / span).square().flatten(1).sum(1)
    return squared, {"mse": squared.detach() / points.x[0].numel()}
