"""What an objective is given: rows of data or points of trajectories, and the world around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random


class Batch(NamedTuple):
    """Rows of data. x_0: (B, ...); labels: (B,) | None; sample: (B,) global row ids; drop: (B,) bool, labels dropped."""

    x_0: Tensor
    labels: Tensor | None
    sample: Tensor
    drop: Tensor | None


class Kept(NamedTuple):
    """Features of images that come again, of which the distance is one. features: each (B, ...)."""

    distance: str
    features: list[Tensor]


class Points(NamedTuple):
    """Points of teacher trajectories: state x at time t, and state x_r at the later node's own time r (r < t).

    x, x_r: (B, ...); t, r: (B,); labels: (B,) | None; drop: (B,) bool | None; sample: (B,) global row ids | None. For
    consistency models r is the endpoint. kept: the features of x_r, where they were computed once a trajectory.
    """

    x: Tensor
    t: Tensor
    x_r: Tensor
    r: Tensor
    labels: Tensor | None
    drop: Tensor | None
    sample: Tensor | None = None
    kept: Kept | None = None


class LossContext(NamedTuple):
    """path; random numbers of this step; teacher (guided, frozen) or None; progress in [0, 1); features for distances.

    nimg: student images seen before this step; perceptual: (x, target, random, sample (B,), features of target) -> (B,).
    """

    path: ProbabilityPath
    random: Random
    teacher: Callable | None = None
    progress: float = 0.0
    features: Callable[[Tensor], Tensor] | None = None
    nimg: int = 0
    perceptual: Callable[[Tensor, Tensor, Random, Tensor | None, list[Tensor] | None], Tensor] | None = None
