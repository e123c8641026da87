"""One complete run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cmt_fast.config.schema.data import Data
from cmt_fast.config.schema.model import Model
from cmt_fast.config.schema.numbers import Count, Fraction, Natural, NotNegative, Positive, schema
from cmt_fast.config.schema.objective import CmtCm, CmtMf
from cmt_fast.config.schema.stage import STAGES, Stage


@schema
class SamplerConfig:
    """Few-step sampling. `mid_times`: the times of a consistency model after the first, by number of steps.

    Published second times on VE: 0.821 after ECT on 32 and 64 pixels, 1.526 for EDM2 networks (ImageNet at 64 and 512
    pixels), 0.77569 to watch mid-training, which is node 7 of the 16-step grid from 80 to 0.002. They are read on VE
    alone: flow maps jump on the uniform grid, 1 -> 0.5 -> 0 in two steps. `shift`: of the solver's grid on linear flow.

    told_guidance: scale and interval of times that a network with `model.guided` is told in its few steps.
    """

    mid_times: dict[int, tuple[Positive, ...]] = Field(default_factory=lambda: {2: (0.821,), 4: (5.0, 1.5, 0.4)})
    solver: Literal["dpmpp", "euler", "heun", "jump"] = "dpmpp"
    order: Annotated[int, Field(ge=1, le=3)] = 2
    t_max: Positive = 80.0
    t_min: NotNegative = 0.002
    guidance: float = 1.0
    told_guidance: Annotated[tuple[float, Fraction, Fraction], Field(min_length=3, max_length=3)] = (1.0, 0.0, 1.0)
    teacher_steps: Count = 16
    shift: Positive = 1.0


@schema
class Eval:
    """What is judged: steps of the sampler, number of samples, their seed; and in which features, against what.

    metric: "frechet" in the features of a small classifier or of the data themselves; "fid" and "fd_dinov2" need
    `weights`, a file of their network's, and `reference`, a file of statistics; `vae` decodes latents.
    Without `vae` that is the autoencoder that the store names. labels: of the samples, in the proportions of the "data", or
    "uniform" over the classes that have rows, as FID on ImageNet is published, or as a FILE of labels or counts has them.
    on_error: whether training goes on where an evaluation, a grid or the page of the run fails.
    """

    steps: tuple[Count, ...] = (1, 2)
    n: Annotated[int, Field(ge=2)] = 4000
    n_during: Annotated[int, Field(ge=2)] = 2000
    seed: Natural = 1234
    batch: Count = 1000
    metric: Literal["frechet", "fid", "fd_dinov2"] = "frechet"
    reference: str | None = None
    weights: str | None = None
    vae: str | None = None
    labels: str = "data"
    on_error: Literal["continue", "stop"] = "continue"


@schema
class Torch:
    """Rows by plain torch: in memory on the device, or read ahead from disk by a thread."""

    kind: Literal["torch"] = "torch"


@schema
class Dali:
    """The same rows by NVIDIA DALI. threads: of its pipeline; prefetch: steps it runs ahead.

    workers: processes that read a latent store; 0 reads it in this one. WebDataset shards are read by DALI itself.
    """

    kind: Literal["dali"] = "dali"
    threads: Count = 4
    prefetch: Count = 2
    workers: Natural = 0


Feed = Annotated[Torch | Dali, Field(discriminator="kind")]


@schema
class Features:
    """Training of the classifier behind the distance `latent_lpips` by `cmt train-features`: SGD, lr in steps.

    `width`: of its first stage, the last is eight times as wide. The learning rate falls by `decay` every
    `decay_every_epochs`. `holdout`: the share of the images that it is not trained on and that its accuracy is of. `precision`
    as of a stage; weights, momenta and what is held out are in fp32 in any case. `batch` is over all processes.
    """

    width: Count = 64
    epochs: Count = 100
    batch: Count = 256
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-4
    decay: Positive = 0.1
    decay_every_epochs: Count = 30
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0


@schema
class Run:
    """One complete run: data, model, path, the three stages and the control.

    `pre: null`: the student begins from nothing, its teacher comes from another run.

    `zero_stage`, `zero_teacher`: how far the engine `zero` shards student and teacher; auto: by memory, see --dry-run.
    `timeout_s`: of a collective call, after which a rank that does not answer is given up.
    `saves`: whether checkpoints are written while steps go on.
    `on_nonfinite`: what becomes of a step whose loss or gradient is not finite; `nonfinite_limit`: in a row, before the run ends.
    """

    name: str
    data: Data
    model: Model
    path: Literal["ve", "linear"]
    pre: Stage | None
    mid: Stage
    post: Stage
    control: Stage | None = None
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    eval: Eval = Field(default_factory=Eval)
    features: Features = Field(default_factory=Features)
    seed: Natural = 0
    sigma_data: Positive = 0.5
    device: str = "auto"
    engine: Literal["local", "zero"] = "local"
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    zero_teacher: Literal["auto", "whole", "sharded"] = "auto"
    timeout_s: Positive = 1800.0
    saves: Literal["background", "waiting"] = "background"
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    nonfinite_limit: Count = 10
    loader: Feed = Field(default_factory=Torch)
    tensorboard: bool = False
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()

    @property
    def logging(self) -> tuple[str, ...]:
        """The loggers that it names, each once; `tensorboard: true` is an older word for one of them."""
        return tuple(dict.fromkeys([*["tensorboard"] * self.tensorboard, *self.loggers]))

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that this run has, by name, in order."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    def asked(self, name: str) -> str:
        """Which pairs of nodes the trajectories of a stage are asked about: "end", "any" or "halves", see objectives/mid.

        Those that its keys name; else of mid-training those of post-training, of other stages their own.
        """
        if self.path == "ve":
            return "end"
        stage = self.stages[name]
        if stage.trajectories and stage.trajectories.pairs != "auto":
            return stage.trajectories.pairs
        asks = (self.post if isinstance(stage.objective, CmtCm | CmtMf) else stage).objective.asks
        return asks if asks in ("end", "halves") else "any"

    def ancestors(self, name: str) -> list[str]:
        """The stages of this run that `name` starts from or is taught by, and theirs, in order."""
        found: set[str] = set()
        queue = [name]
        while queue:
            more = {p for p in self.stages[queue.pop()].networks().values() if "/" not in p} - found
            found |= more
            queue += more
        return [s for s in self.stages if s in found]
