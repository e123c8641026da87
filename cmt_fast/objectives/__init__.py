"""The objectives, and what each asks for: `OBJECTIVES[kind]`.

Every objective is `f(net, batch, config, context) -> (loss (B,) unreduced, {name: (B,) or scalar})`, and that is
`loss(net, draw(batch, config, context), config, context.stage)`: see `batch`. The docstring of its `loss` begins with its
equation. What it costs is counted (`counting`), what mid-training prepares it for is read off `asks` of its config (`mid`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.objectives import (
    alphaflow,
    ayf,
    cmt,
    consistency,
    continuous,
    denoise,
    drift,
    flow,
    imm,
    lagrangian,
    meanflow,
    rules,
    semigroup,
    shortcut,
)
from cmt_fast.objectives.batch import Batch, LossContext, Points, StageContext, composed


class ObjectiveSpec(NamedTuple):
    """Its two halves, and what it asks for.

    draw: (batch, config, LossContext) -> what the loss reads of this step, a tuple of tensors, None and names.
    loss: (net, what was drawn, config, StageContext) -> (loss (B,), scalars), with nothing of the step in it.
    path: it lives on, None: on any; draws: "data" or "trajectories". title, paper: what the field calls it, and where it is
    from. teacher: whether it calls one itself; tangents: whether its network is given Duals. check: (config, Setting), raises
    ConfigError for keys that do not go together; steps: of a config, the numbers of steps that it trains, None: any; forms: of
    a config, progress of a stage at which the network is called otherwise than at its beginning.
    """

    draw: Callable[[Any, Any, LossContext], Any]
    loss: Callable[[Any, Any, Any, StageContext], tuple[Tensor, dict[str, Tensor]]]
    path: str | None
    draws: str
    title: str
    paper: str
    teacher: bool = False
    tangents: bool = False
    check: Callable[[Any, rules.Setting], None] = rules.none
    steps: Callable[[Any], tuple[int, ...]] | None = None
    forms: Callable[[Any], tuple[float, ...]] = lambda config: ()

    @property
    def function(self) -> Callable[[Any, Any, Any, LossContext], tuple[Tensor, dict[str, Tensor]]]:
        """Both halves, one after the other."""
        return composed(self.draw, self.loss)

    @property
    def equation(self) -> str:
        """The first paragraph of its loss' docstring."""
        first = (self.loss.__doc__ or "").strip().partition("\n\n")[0]
        return "\n".join(line.strip() for line in first.splitlines())

    def on(self, path: str) -> bool:
        """Whether it lives on this path."""
        return self.path in (None, path)


CMT, EDM = "Hu et al. 2025, arXiv 2509.24526", "Karras et al. 2022, arXiv 2206.00364"
ECT, SCM = "Geng et al. 2024, arXiv 2406.14548", "Lu and Song 2024, arXiv 2410.11081"
OBJECTIVES = {
    "denoise": ObjectiveSpec(denoise.draw, denoise.loss, "ve", "data", "EDM denoising", EDM),
    "flow": ObjectiveSpec(
        flow.draw, flow.loss, "linear", "data", "flow matching", "Lipman et al. 2022, arXiv 2210.02747"
    ),
    "cmt_cm": ObjectiveSpec(
        cmt.draw_cm, cmt.loss_cm, "ve", "trajectories", "CMT of a consistency function", CMT
    ),
    "cmt_mf": ObjectiveSpec(cmt.draw_mf, cmt.loss_mf, "linear", "trajectories", "CMT of a flow map", CMT),
    "ect": ObjectiveSpec(
        consistency.draw, consistency.loss_ect, "ve", "data", "easy consistency tuning", ECT
    ),
    "ecd": ObjectiveSpec(
        consistency.draw, consistency.loss_ecd, "ve", "data", "easy consistency distillation", ECT, teacher=True
    ),
    "meanflow": ObjectiveSpec(
        meanflow.draw, meanflow.loss_meanflow, "linear", "data", "MeanFlow", "Geng et al. 2025, arXiv 2505.13447",
        tangents=True, check=meanflow.check,
    ),
    "imeanflow": ObjectiveSpec(
        meanflow.draw, meanflow.loss_improved, "linear", "data", "improved MeanFlow", "Geng et al. 2025, arXiv 2512.02012",
        tangents=True, check=meanflow.check,
    ),
    "sct": ObjectiveSpec(
        continuous.draw, continuous.loss_sct, "ve", "data", "continuous-time consistency training", SCM,
        tangents=True,
    ),
    "scd": ObjectiveSpec(
        continuous.draw, continuous.loss_scd, "ve", "data", "continuous-time consistency distillation", SCM,
        teacher=True, tangents=True,
    ),
    "ayf": ObjectiveSpec(
        ayf.draw, ayf.loss, "linear", "data", "Align Your Flow (Eulerian)", "Sabour et al. 2025, arXiv 2506.14603",
        teacher=True, tangents=True,
    ),
    "lagrangian": ObjectiveSpec(
        lagrangian.draw, lagrangian.loss, "linear", "data", "Lagrangian flow map matching",
        "Boffi et al. 2024 and 2025, arXiv 2406.07507, 2505.18825", tangents=True, check=lagrangian.check,
    ),
    "semigroup": ObjectiveSpec(
        semigroup.draw, semigroup.loss, "linear", "data", "progressive self-distillation, SplitMeanFlow",
        "Boffi et al. 2025, arXiv 2505.18825; Guo et al. 2025, arXiv 2507.16884",
        check=semigroup.check,
    ),
    "shortcut": ObjectiveSpec(
        shortcut.draw, shortcut.loss, "linear", "data", "shortcut models", "Frans et al. 2024, arXiv 2410.12557",
        check=shortcut.check, steps=shortcut.steps,
    ),
    "alphaflow": ObjectiveSpec(
        alphaflow.draw, alphaflow.loss, "linear", "data", "AlphaFlow", "Zhang et al. 2025, arXiv 2510.20771",
        tangents=True, check=alphaflow.check, forms=alphaflow.forms,
    ),
    "imm": ObjectiveSpec(
        imm.draw, imm.loss, "linear", "data", "inductive moment matching", "Zhou et al. 2025, arXiv 2503.07565",
        check=imm.check,
    ),
    "drift": ObjectiveSpec(
        drift.draw, drift.loss, None, "data", "drifting of a one-step generator", "Deng et al. 2026, arXiv 2602.04770",
        check=drift.check,
    ),
}  # fmt: skip


def taught(objective: Any) -> bool:
    """Whether an objective, as it is set, calls a teacher itself."""
    return OBJECTIVES[objective.kind].teacher or getattr(objective, "velocity", None) == "teacher"


def check_steps(objective: Any, steps: Iterable[int], key: str = "eval.steps") -> None:
    """Raises ConfigError for numbers of steps whose jumps `objective` does not train. key: what to name."""
    trained = OBJECTIVES[objective.kind].steps
    if trained is None:
        return
    valid = trained(objective)
    for k in steps:
        if k not in valid:
            raise ConfigError(
                f"{key}: {k}, and {objective.kind} trains no jump of length 1/{k}; valid are {', '.join(map(str, valid))}"
            )


__all__ = ["OBJECTIVES", "Batch", "LossContext", "ObjectiveSpec", "Points", "StageContext", "check_steps", "taught"]
