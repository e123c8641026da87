"""Consistency mid-training (arXiv 2509.24526): regress points of the teacher's trajectory to where it leads."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from cmt_fast.config.schema import CmtCm, CmtMf
from cmt_fast.objectives.batch import LossContext, Points, StageContext, composed
from cmt_fast.objectives.distance import augmentation, distance


class Drawn(NamedTuple):
    """The points, and the augmentation of a perceptual distance, if it has one."""

    points: Points
    augmentation: Any


def draw_cm(points: Points, config: CmtCm, context: LossContext) -> Drawn:
    """The points were drawn with their trajectories; a distance may draw an augmentation."""
    return Drawn(points, augmentation(config.distance, context, points.x, points.sample))


def loss_cm(net, drawn: Drawn, config: CmtCm, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = d(f(x_t, t), x_end)

    x_t any node of a trajectory of the solver, x_end its last one; weight 1, no stop-gradient. Returns (B,).

    A distance of features takes the endpoint's from the points where they have them.
    """
    points = drawn.points
    f = net(points.x, points.t, None, points.labels, points.drop)
    loss = distance(f, points.x_r, config.distance, config.c, stage, drawn.augmentation, points.kept)
    return loss, {"mse": (f.detach() - points.x_r).square().flatten(1).mean(1)}


def draw_mf(points: Points, config: CmtMf, context: LossContext) -> Points:
    """The points were drawn with their trajectories."""
    return points


def loss_mf(net, points: Points, config: CmtMf, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = ||u(x_t, r, t) - (x_t - x_r)/(t - r)||^2

    x_t and x_r two nodes of a trajectory of the solver, at its own times t > r. Returns (B,).

    A trajectory with a guidance scale omega and an interval of its own is that of v_null + omega (v_cond - v_null) in the
    interval and of v_cond outside, and u is told both: of all scales of improved MeanFlow, before it, at once.
    """
    more = () if points.guide is None else (None, False, points.guide)
    u = net(points.x, points.t, points.r, points.labels, points.drop, *more)
    span = (points.t - points.r).view(-1, *[1] * (points.x.ndim - 1))
    squared = (u - (points.x - points.x_r) / span).square().flatten(1).sum(1)
    return squared, {"mse": squared.detach() / points.x[0].numel()}


cmt_cm, cmt_mf = composed(draw_cm, loss_cm), composed(draw_mf, loss_mf)
