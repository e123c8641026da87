"""One complete run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cmt_fast.schema.data import Data
from cmt_fast.schema.model import Model
from cmt_fast.schema.numbers import Count, Natural, NotNegative, Positive, schema
from cmt_fast.schema.stage import Stage


@schema
class Sampler:
    """Few-step sampling. `mid_times`: the times of a consistency model after the first, by number of steps."""

    mid_times: dict[int, tuple[Positive, ...]] = Field(default_factory=lambda: {2: (0.821,), 4: (5.0, 1.5, 0.4)})
    solver: Literal["dpmpp", "euler", "heun", "jump"] = "dpmpp"
    order: Annotated[int, Field(ge=1, le=3)] = 2
    t_max: Positive = 80.0
    t_min: NotNegative = 0.002
    guidance: float = 1.0
    teacher_steps: Count = 16


@schema
class Eval:
    """What is judged: steps of the sampler, number of samples, their seed."""

    steps: tuple[Count, ...] = (1, 2)
    n: Annotated[int, Field(ge=2)] = 4000
    n_during: Annotated[int, Field(ge=2)] = 2000
    seed: Natural = 1234
    batch: Count = 1000


@schema
class Run:
    """One complete run: data, model, path, the three stages and the control.

    `zero_stage`, `zero_teacher`: how far the engine `zero` shards student and teacher; auto: by memory, see --dry-run.
    `timeout_s`: of a collective call, after which a rank that does not answer is given up.
    """

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
    engine: Literal["local", "zero"] = "local"
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    zero_teacher: Literal["auto", "whole", "sharded"] = "auto"
    timeout_s: Positive = 1800.0
    tensorboard: bool = False

    def stage(self, name: str) -> Stage | None:
        """The stage called `name`, None where a run has no control."""
        return getattr(self, name)
