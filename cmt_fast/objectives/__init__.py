"""The objectives, one function each, and what each asks for: `OBJECTIVES[kind]`.

Every objective is `f(net, batch, config, context) -> (loss (B,) unreduced, {name: (B,) or scalar})`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from cmt_fast.objectives import cmt, consistency, continuous, denoise, flow, meanflow
from cmt_fast.objectives.batch import Batch, LossContext, Points


class ObjectiveSpec(NamedTuple):
    """function; path it lives on; "data" or "trajectories" it draws from; whether it calls a teacher itself."""

    function: Callable[[Any, Any, Any, LossContext], tuple[Tensor, dict[str, Tensor]]]
    path: str
    draws: str
    teacher: bool = False
    forwards: float = 3.0  # student work in forwards an image, backward counted as two


OBJECTIVES = {
    "denoise": ObjectiveSpec(denoise.denoise, "ve", "data"),
    "flow": ObjectiveSpec(flow.flow, "linear", "data"),
    "cmt_cm": ObjectiveSpec(cmt.cmt_cm, "ve", "trajectories"),
    "cmt_mf": ObjectiveSpec(cmt.cmt_mf, "linear", "trajectories"),
    "ect": ObjectiveSpec(consistency.ect, "ve", "data", forwards=4.0),
    "ecd": ObjectiveSpec(consistency.ecd, "ve", "data", teacher=True, forwards=4.0),
    "meanflow": ObjectiveSpec(meanflow.meanflow, "linear", "data", forwards=3.0),
    "imeanflow": ObjectiveSpec(meanflow.improved, "linear", "data", forwards=3.0),
    "sct": ObjectiveSpec(continuous.sct, "ve", "data", forwards=4.0),
    "scd": ObjectiveSpec(continuous.scd, "ve", "data", teacher=True, forwards=4.0),
}
__all__ = ["OBJECTIVES", "Batch", "LossContext", "ObjectiveSpec", "Points"]
