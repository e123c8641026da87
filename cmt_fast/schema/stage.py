"""A stage of training as data: its objective, its teacher's trajectories, its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cmt_fast.schema.numbers import Count, Fraction, Natural, NotNegative, Positive, schema
from cmt_fast.schema.objective import CmtCm, CmtMf, Objective

STAGES = ("pre", "mid", "post", "control")


@schema
class Trajectories:
    """The teacher's rollouts. `pool`: shuffled points of many trajectories, `paper`: batch // nfe of them, all points.

    `per_trajectory`: points (consistency models, at most all) or pairs (flow maps) drawn from each in mode pool.
    """

    solver: Literal["dpmpp", "euler", "heun", "jump"] = "dpmpp"
    order: Annotated[int, Field(ge=1, le=3)] = 3
    nfe: Count = 16
    t_max: Positive = 80.0
    t_min: NotNegative = 0.002
    shift: Positive = 1.0
    guidance: float = 1.0
    mode: Literal["pool", "paper"] = "pool"
    per_trajectory: Count = 16
    pool_steps: Count = 16
    rollout_batch: Count = 1024


@schema
class Anchor:
    """Keeps a share of each post-training batch on the mid-training loss; `post_weight` scales the post loss beside it."""

    objective: Annotated[CmtCm | CmtMf, Field(discriminator="kind")]
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    post_weight: Positive = 1.0


@schema
class ConstantEma:
    """beta after a ramp: min(beta, (1 + n) / (10 + n)) at step n."""

    kind: Literal["constant"] = "constant"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.999


@schema
class PowerEma:
    """Power-function profile of relative width sigma_rel (Karras et al. 2024, EDM2); post-hoc reconstruction needs two."""

    sigma_rel: Annotated[float, Field(gt=0, lt=0.28)]
    kind: Literal["power"] = "power"


Ema = Annotated[ConstantEma | PowerEma, Field(discriminator="kind")]


@schema
class Stage:
    """One stage of training, as data. Lengths are in student images; `start` and `teacher` name earlier stages.

    `micro_batch`: rows of one forward and backward of one process; a step makes as many as its batch needs (default: one).
    """

    objective: Objective
    images_nimg: Count
    batch: Count = 128
    micro_batch: Count | None = None
    start: Literal["pre", "mid", "post"] | None = None
    teacher: Literal["pre", "mid", "post"] | None = None
    trajectories: Trajectories | None = None
    anchor: Anchor | None = None
    teacher_guidance: float = 1.0
    label_dropout: Fraction = 0.0
    lr: Positive = 1e-3
    lr_schedule: Literal["constant", "linear"] = "linear"
    warmup_nimg: Natural = 0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    clip: NotNegative = 1.0
    ema: Annotated[tuple[Ema, ...], Field(min_length=1)] = (ConstantEma(),)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # torch.compile of the network; rounds differently, so it belongs to the facts of a stage
    checkpoint_every_nimg: Count | None = None
    snapshot_every_nimg: Count | None = None
    eval_every_nimg: Count | None = None
    grid_every_nimg: Count | None = None
