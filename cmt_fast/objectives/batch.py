"""What an objective is given: rows of data or points of trajectories, and the world around them.

An objective has two halves. `draw` makes of a batch all that depends on the step: times, noise, points of the path,
schedules. Its numbers are tensors and nothing else, since a Python number would be a constant in a graph of the step. `loss`
is a pure function of the network, those tensors and what stays the same for a stage (`StageContext`): one step of it is
captured as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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
    consistency models r is the endpoint. kept: the features of x_r, where they were computed once a trajectory. guide: (B, 3) |
    None, the guidance scale and interval that the trajectory was rolled out with, of which the student is told.
    """

    x: Tensor
    t: Tensor
    x_r: Tensor
    r: Tensor
    labels: Tensor | None
    drop: Tensor | None
    sample: Tensor | None = None
    kept: Kept | None = None
    guide: Tensor | None = None


class StageContext(NamedTuple):
    """What a loss reads besides what was drawn, the same at every step of a stage.

    path; teacher (guided, frozen) or None; features for distances; perceptual: (x, target, augmentation, features of the
    target) -> (B,), whose augmentation `draw(random, sample (B,), shape of a row)` gives, None where there is none.
    """

    path: ProbabilityPath
    teacher: Callable | None = None
    features: Callable[[Tensor], Tensor] | None = None
    perceptual: Any = None

    def velocity(self, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The (guided) teacher's velocity on "linear", without a gradient. z: (B, ...), t: (B,) -> (B, ...) in the dtype of z."""
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher(z, t, t, labels).to(z.dtype)


class LossContext(NamedTuple):
    """What a step draws by: random numbers of the step, progress in [0, 1), nimg, the student images seen before it.

    The others are as of StageContext, which is all that a loss is given.
    """

    path: ProbabilityPath
    random: Random
    teacher: Callable | None = None
    progress: float = 0.0
    features: Callable[[Tensor], Tensor] | None = None
    nimg: int = 0
    perceptual: Any = None

    @property
    def stage(self) -> StageContext:
        """What stays the same from step to step."""
        return StageContext(self.path, self.teacher, self.features, self.perceptual)


def composed(draw: Callable, loss: Callable) -> Callable:
    """The whole objective: f(net, batch, config, context) -> (loss (B,) unreduced, {name: (B,) or scalar})."""

    def objective(net: Any, batch: Any, config: Any, context: LossContext) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(net, draw(batch, config, context), config, context.stage)

    return objective
