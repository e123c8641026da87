"""The objectives, one function each, and what each asks for: `ROWS[kind]`.

Every objective is `f(net, batch, config, world) -> (loss (B,) unreduced, {name: (B,) or scalar})`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from cmt_fast.objectives import cmt, consistency, continuous, denoise, flow, meanflow
from cmt_fast.objectives.batch import Batch, Points, World


class Needs(NamedTuple):
    """function; path it lives on; "data" or "trajectories" it draws from; whether it calls a teacher itself."""

    function: Callable[[Any, Any, Any, World], tuple[Tensor, dict[str, Tensor]]]
    path: str
    draws: str
    teacher: bool = False
    forwards: float = 3.0  # student work in forwards an image, backward counted as two


ROWS = {
    "denoise": Needs(denoise.denoise, "ve", "data"),
    "flow": Needs(flow.flow, "linear", "data"),
    "cmt_cm": Needs(cmt.cmt_cm, "ve", "trajectories"),
    "cmt_mf": Needs(cmt.cmt_mf, "linear", "trajectories"),
    "ect": Needs(consistency.ect, "ve", "data", forwards=4.0),
    "ecd": Needs(consistency.ecd, "ve", "data", teacher=True, forwards=4.0),
    "meanflow": Needs(meanflow.meanflow, "linear", "data", forwards=3.0),
    "imeanflow": Needs(meanflow.improved, "linear", "data", forwards=3.0),
    "sct": Needs(continuous.sct, "ve", "data", forwards=4.0),
    "scd": Needs(continuous.scd, "ve", "data", teacher=True, forwards=4.0),
}
__all__ = ["ROWS", "Batch", "Needs", "Points", "World"]
