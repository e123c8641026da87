"""The stages that benches run: a recipe's, around another network and seeded rows, with a teacher that was not trained.

Rows, loss, trajectories and optimizer are the trainer's own (`BatchProvider`, `Pool`, the local engine); what a run has on disk
is not there. Gates are moved away from zero, so that tangents and trajectories are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.training.networks import MEANFLOW, perturb
from cmt_fast import models
from cmt_fast.config import loading
from cmt_fast.config.schema import Dit, Ecd, Run, Stage
from cmt_fast.data import datasets
from cmt_fast.data.rows import Dataset
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.engine import LocalEngine
from cmt_fast.engine.buffers import bind
from cmt_fast.engine.graph import StepGraph
from cmt_fast.models.dit import SIZES
from cmt_fast.run.resolved import resolve
from cmt_fast.run.workspace import Workspace
from cmt_fast.train.batches import BatchProvider


class Model(NamedTuple):
    """A network and its rows. channels 1: the digits; 4: random latents. batch: rows of a step; pool_steps: of a round."""

    name: str
    width: int
    depth: int
    heads: int
    channels: int
    side: int
    batch: int
    pool_steps: int

    @property
    def tokens(self) -> int:
        """Tokens of an image, in patches of 2 x 2."""
        return (self.side // 2) ** 2


class Objective(NamedTuple):
    """recipe and stage whose settings hold; whether bf16 is safe."""

    recipe: str
    stage: str
    bf16: bool


# ECT and ECD tell f(x_t) from f(x_r) at steps below bf16's resolution, so they stay in fp32
OBJECTIVES = {
    "FM": Objective("digits-mf", "pre", True),
    "CMT-CM": Objective("digits", "mid", True),
    "CMT-MF": Objective("digits-mf", "mid", True),
    "MF": Objective("digits-mf", "control", True),
    "ECT": Objective("digits", "control", False),
    "ECD": Objective("digits", "control", False),
}
SMALL = {
    "digits": Model("digits", *SIZES["tiny"], channels=1, side=8, batch=64, pool_steps=20),
    "w384d6t64": Model("w384d6t64", 384, 6, 6, channels=4, side=16, batch=16, pool_steps=8),
    "dry": Model("dry", 32, 1, 2, channels=4, side=8, batch=16, pool_steps=2),
}


def model(name: str, batch: int | None = None) -> Model:
    """One of SMALL, or a size of the DiT with its tokens, such as XL256. Raises ValueError for another name."""
    found = SMALL.get(name)
    if found is None:
        size = next((s for s in SIZES if name.startswith(s) and name[len(s) :].isdecimal()), None)
        tokens = int(name[len(size) :]) if size else 0
        cells = round(tokens**0.5)
        if not size or cells**2 != tokens:
            raise ValueError(f"--model: {name!r} is not valid; valid are {', '.join(SMALL)}, or XL256: {SIZE_NAMES}")
        rows = 16 if tokens >= 1024 else 64
        found = Model(name, *SIZES[size], channels=4, side=2 * cells, batch=rows, pool_steps=16)
    return found._replace(batch=batch) if batch else found


SIZE_NAMES = f"one of {', '.join(SIZES)} and a square number of tokens"


class Bench(Workspace):
    """A run without a folder: its rows are seeded, every network it is asked for is the same frozen teacher."""

    def __init__(self, run: Run, rows: Dataset, device: torch.device) -> None:
        self.run, self.data, self.device = run, rows, device
        self.path = ProbabilityPath(run.path, run.sigma_data)
        self.folder = pathlib.Path()  # nothing of the run is in it
        self.changes: dict[str, Any] = {}
        self.teacher: Any = None
        self.changes = {}

    def network(self, name: str) -> Callable:
        """The teacher."""
        if self.teacher is None:
            self.teacher = self.build().to(self.device).requires_grad_(False).eval()
        return self.teacher

    def build(self) -> nn.Module:
        """A fresh network with open gates, made where it will be: drawing an XL's weights on a CPU takes many seconds."""
        with torch.random.fork_rng(devices=[]), self.device:
            torch.manual_seed(self.run.seed)
            return perturb(
                models.build(self.run.model, self.run.path, self.run.sigma_data, self.data.shape, self.data.classes)
            )


def workspace(objective: str, m: Model, device: str) -> Bench:
    """The recipe of an objective around this network."""
    run = loading.load(OBJECTIVES[objective].recipe)
    run = dataclasses.replace(run, model=Dit(width=m.width, depth=m.depth, heads=m.heads))
    if m.channels == 1:
        rows = datasets.load(run.data)
    else:
        g = torch.Generator().manual_seed(2)
        n = 4 * m.batch
        rows = Dataset(torch.randn(n, m.channels, m.side, m.side, generator=g), torch.arange(n) % 10, 10)
    return Bench(run, rows, torch.device(device))


def more(arguments: argparse.Namespace) -> list[str]:
    """What all of our steps have besides, as `stage_of` takes it."""
    return [name for name in ("graph", "stream") if getattr(arguments, name)]


def stage_of(
    work: Bench, objective: str, m: Model, precision: str, compiles: bool, points: int | None, more: Sequence[str] = ()
) -> Stage:
    """The stage's own settings at this batch; mid-training draws `points` a trajectory, all of its network calls' worth
    (one teacher forward a row) unless given. more: "graph": the step is one CUDA graph, or the first steps raise ConfigError;
    "stream": what is in bf16 has its residual stream in bf16 too."""
    resolved = work.stage(OBJECTIVES[objective].stage)
    narrow = "-stream" if "stream" in more and precision == "bf16" else ""
    change: dict[str, Any] = {"batch": m.batch, "precision": precision + narrow, "compile": compiles, "anchor": None}
    change["cuda_graph"] = "graph" in more
    if objective == "MF":
        change["objective"] = MEANFLOW  # a quarter of the rows with r < t, as published for ImageNet
    if objective == "ECD":
        change |= {"objective": Ecd(), "teacher": "pre"}
    if resolved.trajectory_rows:
        t = resolved.trajectories
        change["trajectories"] = dataclasses.replace(t, per_trajectory=points or t.nfe, pool_steps=m.pool_steps)
    return resolved.replaced(**change).config


class Ours:
    """One step of the trainer's loop: its rows and loss, backward, optimizer. What a round of trajectories costs is apart.

    `share`: another of these, whose parameters, moments and EMA it takes over, so that several fit on one GPU.
    """

    def __init__(self, work: Bench, objective: str, stage: Stage, share: Ours | None = None) -> None:
        self.engine = LocalEngine(work.build(), stage, work.device)
        if share:
            for name in ("p", "g", "m", "v", "emas"):
                setattr(self.engine, name, getattr(share.engine, name))
            bind(self.engine.net, self.engine.p)
            bind(self.engine.net, self.engine.g, grad=True)
            self.engine.share_half(share.engine)
        self.work, self.objective = work, objective
        self.take(stage)

    def take(self, stage: Stage) -> None:
        """Go on with rows of another batch, or points of other trajectories, on the same engine."""
        self.stage, self.source, self.pool, self.gradient = (
            stage,
            None,
            None,
            None,
        )  # what the last rows held goes first
        name = OBJECTIVES[self.objective].stage
        self.work.run = dataclasses.replace(self.work.run, **{name: stage})
        work, own = self.work, resolve(self.work.run, name)
        self.source = BatchProvider(own, self.engine, work.data, work.device, work.network, lambda: work.judging.space)
        self.pool, self.step = self.source.pool, 0
        self.gradient = StepGraph(self.engine, lambda drawn: self.source.loss_of(self.engine, drawn), name, print)

    def loss(self) -> Tensor:
        """Of the step's rows."""
        return self.source.loss(self.engine, self.step)[0]

    def __call__(self) -> None:
        """One step on a pool that is there; within a round its rows are those of the step."""
        self.gradient(self.source.draw(self.step))
        self.engine.step(1e-5)
        self.step = (self.step + 1) % (self.pool.steps if self.pool else 1_000_000)

    def fill(self) -> None:
        """Roll out a round of trajectories, as the first of every `pool.steps` steps does."""
        assert self.pool is not None
        self.pool._fill(0)
