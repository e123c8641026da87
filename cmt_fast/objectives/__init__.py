"""The objectives, and what each asks for: `OBJECTIVES[kind]`.

Every objective is `f(net, batch, config, context) -> (loss (B,) unreduced, {name: (B,) or scalar})`, and that is
`loss(net, draw(batch, config, context), config, context.stage)`: see `batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from cmt_fast.objectives import cmt, consistency, continuous, denoise, flow, meanflow
from cmt_fast.objectives.batch import Batch, LossContext, Points, StageContext, composed


class ObjectiveSpec(NamedTuple):
    """Its two halves; path it lives on; "data" or "trajectories" it draws from; whether it calls a teacher itself.

    draw: (batch, config, LossContext) -> what the loss reads of this step, a tuple of tensors, None and names.
    loss: (net, what was drawn, config, StageContext) -> (loss (B,), scalars), with nothing of the step in it.
    """

    draw: Callable[[Any, Any, LossContext], Any]
    loss: Callable[[Any, Any, Any, StageContext], tuple[Tensor, dict[str, Tensor]]]
    path: str
    draws: str
    teacher: bool = False
    forwards: float = 3.0  # student work in forwards an image, backward counted as two

    @property
    def function(self) -> Callable[[Any, Any, Any, LossContext], tuple[Tensor, dict[str, Tensor]]]:
        """Both halves, one after the other."""
        return composed(self.draw, self.loss)


OBJECTIVES = {
    "denoise": ObjectiveSpec(denoise.draw, denoise.loss, "ve", "data"),
    "flow": ObjectiveSpec(flow.draw, flow.loss, "linear", "data"),
    "cmt_cm": ObjectiveSpec(cmt.draw_cm, cmt.loss_cm, "ve", "trajectories"),
    "cmt_mf": ObjectiveSpec(cmt.draw_mf, cmt.loss_mf, "linear", "trajectories"),
    "ect": ObjectiveSpec(consistency.draw, consistency.loss_ect, "ve", "data", forwards=4.0),
    "ecd": ObjectiveSpec(consistency.draw, consistency.loss_ecd, "ve", "data", teacher=True, forwards=4.0),
    "meanflow": ObjectiveSpec(meanflow.draw, meanflow.loss_meanflow, "linear", "data", forwards=3.0),
    "imeanflow": ObjectiveSpec(meanflow.draw, meanflow.loss_improved, "linear", "data", forwards=3.0),
    "sct": ObjectiveSpec(continuous.draw, continuous.loss_sct, "ve", "data", forwards=4.0),
    "scd": ObjectiveSpec(continuous.draw, continuous.loss_scd, "ve", "data", teacher=True, forwards=4.0),
}
__all__ = ["OBJECTIVES", "Batch", "LossContext", "ObjectiveSpec", "Points", "StageContext"]
