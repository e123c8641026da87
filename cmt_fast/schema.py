"""The one schema: frozen dataclasses that a recipe's YAML and `a.b=value` overrides must fit (read by config.py).

Every number a run depends on is here or in its recipe; the resolved form and its hash are saved with the run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STAGES = ("pre", "mid", "post", "control")
_schema = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


# ---------------------------------------------------------------------------------------------- data and model


@_schema
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, scaled to [-1, 1], ten classes."""

    kind: Literal["digits"] = "digits"


@_schema
class Gmm:
    """A 2-D Gaussian mixture on a circle: denoiser, velocity and flow map are known in closed form."""

    kind: Literal["gmm"] = "gmm"
    components: Count = 6
    radius: Positive = 1.0
    std: Positive = 0.25
    n: Count = 20000


@_schema
class Npz:
    """A file of one's own: `images` (N, C, H, W), float32 in [-1, 1] or uint8, and optionally `labels` (N,)."""

    path: str
    kind: Literal["npz"] = "npz"


Data = Annotated[Digits | Gmm | Npz, Field(discriminator="kind")]


@_schema
class Dit:
    """Diffusion transformer. `size` sets width, depth and heads; each may be set by itself.

    `checkpoint_activations`: blocks keep their input alone and run again in the backward pass: less memory, more time.
    """

    kind: Literal["dit"] = "dit"
    size: Literal["tiny", "S", "B", "L", "XL"] = "tiny"
    patch: Count = 2
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    qk_norm: bool = False
    rope: bool = False
    checkpoint_activations: bool = False


@_schema
class Mlp:
    """Residual MLP for vectors."""

    kind: Literal["mlp"] = "mlp"
    width: Count = 128
    depth: Count = 3


Model = Annotated[Dit | Mlp, Field(discriminator="kind")]

# ---------------------------------------------------------------------------------------------- objectives


@_schema
class Denoise:
    """EDM denoising: ln t ~ N(mean, std^2)."""

    kind: Literal["denoise"] = "denoise"
    mean: float = -1.2
    std: Positive = 1.2


@_schema
class Flow:
    """Flow matching: t ~ logit-normal(mean, std)."""

    kind: Literal["flow"] = "flow"
    mean: float = -0.4
    std: Positive = 1.0


Distance = Literal["squared_l2", "l2", "pseudo_huber", "features"]


@_schema
class CmtCm:
    """Consistency mid-training of a consistency function. `features`: squared l2 in a frozen network's features."""

    kind: Literal["cmt_cm"] = "cmt_cm"
    distance: Distance = "l2"
    c: Positive = 0.01


@_schema
class CmtMf:
    """Consistency mid-training of an average velocity."""

    kind: Literal["cmt_mf"] = "cmt_mf"


@_schema
class Ect:
    """Easy consistency tuning: r = t (1 - n(t)/q^(s+1)), n(t) = 1 + k sigmoid(-b t); s grows by one `doublings` times."""

    kind: Literal["ect"] = "ect"
    mean: float = -1.1
    std: Positive = 2.0
    q: Annotated[float, Field(gt=1)] = 64.0
    k: Annotated[float, Field(ge=0)] = 8.0
    b: float = 1.0
    doublings: Natural = 0
    distance: Distance = "pseudo_huber"
    c: Positive = 0.01
    weight: Literal["inverse_step", "snr", "one"] = "inverse_step"


@_schema
class Ecd:
    """Easy consistency distillation: ECT with the teacher's ODE step from t to r in place of the data's noise."""

    kind: Literal["ecd"] = "ecd"
    mean: float = -1.1
    std: Positive = 2.0
    q: Annotated[float, Field(gt=1)] = 64.0
    k: Annotated[float, Field(ge=0)] = 8.0
    b: float = 1.0
    doublings: Natural = 0
    distance: Distance = "pseudo_huber"
    c: Positive = 0.01
    weight: Literal["inverse_step", "snr", "one"] = "snr"
    step: Literal["euler", "heun"] = "heun"


@_schema
class MeanFlow:
    """MeanFlow: the share `ratio` of rows has r < t and carries tangents; guidance inside the target by omega, kappa."""

    kind: Literal["meanflow"] = "meanflow"
    mean: float = -0.4
    std: Positive = 1.0
    ratio: Fraction = 0.25
    p: Annotated[float, Field(ge=0)] = 1.0
    c: Positive = 0.01
    omega: float = 1.0
    kappa: float = 0.0
    guide_t_min: Fraction = 0.0
    guide_t_max: Fraction = 1.0


Objective = Annotated[Denoise | Flow | CmtCm | CmtMf | Ect | Ecd | MeanFlow, Field(discriminator="kind")]

# ---------------------------------------------------------------------------------------------- stages


@_schema
class Trajectories:
    """The teacher's rollouts. `pool`: shuffled points of many trajectories, `paper`: batch // nfe of them, all points.

    `per_trajectory`: points (consistency models, at most all) or pairs (flow maps) drawn from each in mode pool.
    """

    solver: Literal["dpmpp", "euler", "heun", "jump"] = "dpmpp"
    order: Annotated[int, Field(ge=1, le=3)] = 3
    nfe: Count = 16
    t_max: Positive = 80.0
    t_min: Annotated[float, Field(ge=0)] = 0.002
    shift: Positive = 1.0
    guidance: float = 1.0
    mode: Literal["pool", "paper"] = "pool"
    per_trajectory: Count = 16
    pool_steps: Count = 16
    rollout_batch: Count = 1024


@_schema
class Anchor:
    """Keeps a share of each post-training batch on the mid-training loss; `post_weight` scales the post loss beside it."""

    objective: Annotated[CmtCm | CmtMf, Field(discriminator="kind")]
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    post_weight: Positive = 1.0


@_schema
class ConstantEma:
    """beta after a ramp: min(beta, (1 + n) / (10 + n)) at step n."""

    kind: Literal["constant"] = "constant"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.999


@_schema
class PowerEma:
    """Power-function profile of relative width sigma_rel (Karras et al. 2024, EDM2); post-hoc reconstruction needs two."""

    sigma_rel: Annotated[float, Field(gt=0, lt=0.28)]
    kind: Literal["power"] = "power"


Ema = Annotated[ConstantEma | PowerEma, Field(discriminator="kind")]


@_schema
class Stage:
    """One stage of training, as data. Lengths are in student images; `start` and `teacher` name earlier stages."""

    objective: Objective
    images_nimg: Count
    batch: Count = 128
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
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0
    ema: Annotated[tuple[Ema, ...], Field(min_length=1)] = (ConstantEma(),)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # torch.compile of the network; rounds differently, so it belongs to the facts of a stage
    checkpoint_every_nimg: Count | None = None
    snapshot_every_nimg: Count | None = None
    eval_every_nimg: Count | None = None
    grid_every_nimg: Count | None = None


@_schema
class Sampler:
    """Few-step sampling. `mid_times`: the times of a consistency model after the first, by number of steps."""

    mid_times: dict[int, tuple[Positive, ...]] = Field(default_factory=lambda: {2: (0.821,), 4: (5.0, 1.5, 0.4)})
    solver: Literal["dpmpp", "euler", "heun", "jump"] = "dpmpp"
    order: Annotated[int, Field(ge=1, le=3)] = 2
    t_max: Positive = 80.0
    t_min: Annotated[float, Field(ge=0)] = 0.002
    guidance: float = 1.0
    teacher_steps: Count = 16


@_schema
class Eval:
    """What is judged: steps of the sampler, number of samples, their seed."""

    steps: tuple[Count, ...] = (1, 2)
    n: Annotated[int, Field(ge=2)] = 4000
    n_during: Annotated[int, Field(ge=2)] = 2000
    seed: Natural = 1234
    batch: Count = 1000


@_schema
class Run:
    """One complete run: data, model, path, the three stages and the control."""

    name: str
    data: Data
    model: Model
    path: Literal["ve", "linear"]
    pre: Stage
    mid: Stage
    post: Stage
    control: Stage | None = None
    sampler: Sampler = Field(default_factory=Sampler)
    eval: Eval = Field(default_factory=Eval)
    seed: Natural = 0
    sigma_data: Positive = 0.5
    device: str = "auto"
    engine: Literal["local"] = "local"
    tensorboard: bool = False

    def stage(self, name: str) -> Stage | None:
        """The stage called `name`, None where a run has no control."""
        return getattr(self, name)
