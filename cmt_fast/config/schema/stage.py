"""A stage of training as data: its objective, its teacher's trajectories, its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cmt_fast.config.schema.numbers import Count, Fraction, Natural, NotNegative, Positive, schema
from cmt_fast.config.schema.objective import CmtCm, CmtMf, Drift, Ecd, Ect, Objective

STAGES = ("pre", "mid", "post", "control")
# kinds of EDM's augmentation, in its order, and how many labels tell the network of each
AUGMENTATIONS = {
    "xflip": 1, "yflip": 1, "rotate_int": 2, "translate_int": 2, "scale": 1, "rotate_frac": 2, "aniso": 2, "translate_frac": 2,
}  # fmt: skip


@schema
class Trajectories:
    """The teacher's rollouts. `pool`: shuffled points of many trajectories, `paper`: batch // nfe of them, all points.

    `per_trajectory`: points (consistency models, at most all) or pairs (flow maps) drawn from each in mode pool.
    `nfe`: network calls of a rollout; `auto`: the cheapest solver, order, shift and nfe whose measured error stays below
    the student's own are chosen when the stage begins (`cmt tune-teacher` shows the table), whatever stands here.
    `budget_forwards`: of `auto`, what the stage may take in forwards of student and teacher, a backward being two. Solver, order
    and calls are then those of the least bound on the gradient's bias, and the stage is as long as the budget is with them,
    whatever `images_nimg` is (teacher/solver_worth.py).
    `precision`: of the teacher in rollouts, by default the stage's own. Below fp32 the error of a few endpoints is measured
    first; `auto` takes the cheapest one within `precision_limit`, their relative L2, a named one beyond it is refused.
    `cache`: a folder that `cmt trajectories` wrote; then nothing is rolled out and no teacher is loaded for it.
    `pairs`: of nodes that a flow map is asked about: auto, what the objective that follows asks for; any two; any and the
    last; those whose times differ by a power of 1/2.
    `omega_max`: above 1 each trajectory has a guidance scale and an interval of its own, drawn as in `imeanflow`, that the
    student is told.
    """

    solver: Literal["dpmpp", "euler", "heun", "jump"] = "dpmpp"
    order: Annotated[int, Field(ge=1, le=3)] = 3
    nfe: Count | Literal["auto"] = 16
    t_max: Positive = 80.0
    t_min: NotNegative = 0.002
    shift: Positive = 1.0
    guidance: float = 1.0
    mode: Literal["pool", "paper"] = "pool"
    per_trajectory: Count = 16
    pool_steps: Count = 16
    rollout_batch: Count = 1024
    precision: Literal["stage", "auto", "fp32", "tf32", "bf16", "fp8"] = "stage"
    precision_limit: Positive = 0.02
    cache: str | None = None
    pairs: Literal["auto", "any", "end", "halves"] = "auto"
    budget_forwards: Count | None = None
    omega_max: Annotated[float, Field(ge=1)] = 1.0
    omega_beta: NotNegative = 1.0

    @property
    def guided(self) -> bool:
        """Whether the teacher is called with labels and without in its rollouts."""
        return self.guidance != 1 or self.omega_max != 1

    @property
    def calls(self) -> int:
        """Network calls of a rollout; of `auto`, which is not settled before its stage begins, the published 16."""
        return 16 if self.nfe == "auto" else self.nfe


@schema
class Anchor:
    """Keeps a share of each post-training batch on the mid-training loss; `post_weight` scales the post loss beside it."""

    objective: Annotated[CmtCm | CmtMf, Field(discriminator="kind")]
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    post_weight: Positive = 1.0


@schema
class ConstantEma:
    """beta after a ramp: min(beta, (1 + n) / (10 + n)) at step n; `ramp: false`: beta from the first step on."""

    kind: Literal["constant"] = "constant"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.999
    ramp: bool = True


@schema
class PowerEma:
    """Power-function profile of relative width sigma_rel (Karras et al. 2024, EDM2); post-hoc reconstruction needs two."""

    sigma_rel: Annotated[float, Field(gt=0, lt=0.28)]
    kind: Literal["power"] = "power"


Ema = Annotated[ConstantEma | PowerEma, Field(discriminator="kind")]


@schema
class Autoguidance:
    """Guidance of the teacher by a weaker network (Karras et al. 2024): D = D_guide + scale (D_teacher - D_guide).

    `network`: RUN/STAGE or an earlier stage. `trajectories`: the rollouts too, not the teacher's own steps alone.
    """

    network: str
    scale: Positive = 2.05
    trajectories: bool = False


@schema
class Perceptual:
    """The network behind the distances `lpips` and `latent_lpips`.

    `weights`: for `latent_lpips` what `cmt train-features` wrote; for `lpips` a .safetensors or .pt file of VGG16, with
    the linear heads in it or in `heads`. `augment`: `latent_lpips` compares randomly augmented copies.
    """

    weights: str
    heads: str | None = None
    augment: bool = True


@schema
class Augment:
    """EDM's augmentation of pre-training's images, told to the network by labels (Karras et al. 2022, appendix F.2).

    p: the probability of each kind; a kind's own number multiplies it: 0 is off, beyond 1/p is always. As published: x-flips
    always drawn (half of the images are mirrored), y-flips, scale, rotation, stretch (aniso) and fractional shifts. Quarter turns
    and whole shifts are in EDM's pipe too, and off there. The magnitudes: standard deviations of log2 scale and of log2 stretch,
    of a shift in image sizes; the largest whole shift in image sizes; of rotation, 1 is the full circle; the probability that a
    stretch is along a random axis.
    """

    p: Fraction = 0.12
    xflip: NotNegative = 1e8
    yflip: NotNegative = 1.0
    rotate_int: NotNegative = 0.0
    translate_int: NotNegative = 0.0
    scale: NotNegative = 1.0
    rotate_frac: NotNegative = 1.0
    aniso: NotNegative = 1.0
    translate_frac: NotNegative = 1.0
    translate_int_max: Positive = 0.125
    scale_std: Positive = 0.2
    rotate_frac_max: Positive = 1.0
    aniso_std: Positive = 0.2
    aniso_rotate_prob: Fraction = 0.5
    translate_frac_std: Positive = 0.125

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are on, in EDM's order."""
        return tuple(kind for kind in AUGMENTATIONS if getattr(self, kind) > 0)

    @property
    def labels(self) -> int:
        """Numbers that the network is told: 9 as published."""
        return sum(AUGMENTATIONS[kind] for kind in self.kinds)


@schema
class Stage:
    """One stage of training, as data. Lengths are in student images.

    precision: fp32 is strict, tf32 lets a GPU round the factors of products to 10 bits, bf16 is autocast, bf16-stream is
    that with the residual stream of a transformer in bf16 as well, fp16 is autocast with a scaled loss, `products` is what
    its products are in. rounding_limit: of f(x_t) - f(x_r), beyond which rows of ect and ecd are in fp32 all the same.
    `start` names an earlier stage, `teacher` an earlier stage or one of another run as RUN/STAGE, of any size.
    lr_schedule: "linear" to zero at the end, "inverse_sqrt" constant up to lr_knee_nimg and falling as 1/sqrt from there.
    `cuda_graph`: forward, loss and backward of a step recorded once and replayed on a GPU: auto where it can be, true (or an
    error says why not), false.
    `checkpoint_every_s`: seconds after which a checkpoint is written, beside those by images.
    `augment`: of a diffusion model's images, by a network that is told by labels (`model.augment`).
    `micro_batch`: rows of one forward and backward of one process; a step makes as many as its batch needs (default: one).
    """

    objective: Objective
    images_nimg: Count
    batch: Count = 128
    micro_batch: Count | None = None
    start: Literal["pre", "mid", "post"] | None = None
    teacher: str | None = None
    autoguidance: Autoguidance | None = None
    perceptual: Perceptual | None = None
    trajectories: Trajectories | None = None
    anchor: Anchor | None = None
    teacher_guidance: float = 1.0
    label_dropout: Fraction = 0.0
    augment: Augment | None = None
    lr: Positive = 1e-3
    lr_schedule: Literal["constant", "linear", "inverse_sqrt"] = "linear"
    lr_knee_nimg: Natural = 0
    warmup_nimg: Natural = 0
    optimizer: Literal["adamw", "radam"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    grad_clip_norm: NotNegative = 1.0
    ema: Annotated[tuple[Ema, ...], Field(min_length=1)] = (ConstantEma(),)
    precision: Literal["fp32", "tf32", "bf16", "bf16-stream", "fp16"] = "fp32"
    rounding_limit: Positive = 0.1
    cuda_graph: Literal["auto"] | bool = "auto"  # the same numbers, so no fact of a stage
    compile: bool = False  # torch.compile of the network; rounds differently, so it belongs to the facts of a stage
    checkpoint_every_nimg: Count | None = None
    checkpoint_every_s: Positive | None = 1200.0
    snapshot_every_nimg: Count | None = None
    eval_every_nimg: Count | None = None
    on_nonfinite: Literal["stop", "skip", "rollback"] | None = None
    nonfinite_limit: Count | None = None
    grid_every_nimg: Count | None = None

    @property
    def products(self) -> str:
        """The precision of its matrix products: fp32, tf32, bf16 or fp16."""
        return self.precision.removesuffix("-stream")

    @property
    def half(self) -> bool:
        """Whether its products are in 16 bits; GPUs multiply bf16 and fp16 at the same rate."""
        return self.products in ("bf16", "fp16")

    def networks(self) -> dict[str, str]:
        """Key -> the stage whose network it names, as typed; of another run where there is a slash in it."""
        guide = self.autoguidance.network if self.autoguidance else None
        named = {"start": self.start, "teacher": self.teacher, "autoguidance.network": guide}
        return {key: name for key, name in named.items() if name}

    @property
    def trajectory_dropout(self) -> float:
        """The share of its trajectories that begin without a label: `label_dropout` of mid-training, 0 of an anchor's."""
        return self.label_dropout if isinstance(self.objective, CmtCm | CmtMf) else 0.0

    def distances(self) -> set[str]:
        """The distances of its objective and its anchor, and the space of one that compares sets."""
        both = (self.objective, self.anchor.objective if self.anchor else None)
        named = {o.distance for o in both if isinstance(o, CmtCm | Ect | Ecd)}
        return named | {o.space for o in both if isinstance(o, Drift) and o.space != "data"}
