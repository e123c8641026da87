"""Steps of the ImageNet-512 recipe around an EDM2 of another size: what `launches` counts and `unet` times.

Stages, losses, optimizer and rows are the recipe's: mid-training from the points of trajectories (CMT-CM, in bf16, with its
distance between features of augmented latents), post-training from data (ECD, in TF32, Heun steps of a teacher of the
student's own size). Left out is autoguidance, whose guide is another network. Latents, labels and weights are seeded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.training.networks import perturb
from cmt_fast import models
from cmt_fast.config import loading
from cmt_fast.config.schema import Edm2, Run, Stage
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.models.edm2 import SIZES
from cmt_fast.models.vgg import LatentVgg
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext, Points
from cmt_fast.perceptual.distance import Distance

RECIPE, PREFIX, CLASSES = "imagenet512-ecd", "EDM2-", 1000
STAGES = {"CMT-CM": "mid", "ECD": "post"}


class Unet(NamedTuple):
    """An EDM2 and its rows. name: EDM2-S; model: of the recipe; channels, side: of the latents; width: of the features."""

    name: str
    model: Edm2
    batch: int
    channels: int = 4
    side: int = 64
    features: int = 64


def unet(name: str, batch: int | None = None) -> Unet:
    """EDM2-XS to EDM2-XXL, or `dry`, tiny; the recipe's batch of 128, of what is larger than S the share of one card of eight.

    Raises ValueError for another name.
    """
    if name == "dry":
        tiny = Edm2(width=16, multipliers=(1, 2), blocks=1, attention=(4,), head=8, dropout=0.0)
        return Unet(name, tiny, batch or 4, side=8, features=4)
    if not name.startswith(PREFIX) or name.removeprefix(PREFIX) not in SIZES:
        valid = ", ".join(PREFIX + size for size in SIZES)
        raise ValueError(f"--model: {name!r} is not valid; valid are {valid}")
    size = name.removeprefix(PREFIX)
    return Unet(name, Edm2(size=size, dropout=0.0), batch or (128 if size in ("XS", "S") else 16))


def run_of(m: Unet) -> Run:
    """The recipe with this network."""
    return dataclasses.replace(loading.load(RECIPE), model=m.model)


def stage_of(run: Run, objective: str, m: Unet, precision: str | None = None) -> Stage:
    """The recipe's stage of an objective, in a precision of its own if one is given; the teacher guides itself."""
    stage = run.stages[STAGES[objective]]
    change: dict[str, Any] = {"batch": m.batch, "autoguidance": None}
    return dataclasses.replace(stage, **change | ({"precision": precision} if precision else {}))


def network(run: Run, m: Unet) -> nn.Module:
    """A network with open gains, drawn where tensors are made."""
    torch.manual_seed(0)
    shape = (m.channels, m.side, m.side)
    return perturb(models.build(run.model, run.path, run.sigma_data, shape, CLASSES))


def teacher(run: Run, m: Unet) -> nn.Module:
    """Such a network as teachers are: frozen, its weights divided by their length once."""
    return models.fold(network(run, m).requires_grad_(False).eval())


def context(run: Run, m: Unet, objective: str, teacher: Callable | None) -> LossContext:
    """What the loss of a step reads beside its rows."""
    perceptual = None
    if objective == "CMT-CM":
        perceptual = Distance(LatentVgg(m.channels, CLASSES, m.features), None, augmented=True)
    return LossContext(ProbabilityPath(run.path, run.sigma_data), Random(0, 1, 0), teacher, perceptual=perceptual)


def rows(m: Unet, objective: str) -> Batch | Points:
    """Rows as the loader or the pool gives them, at times that the solver has."""
    x, other = (torch.randn(m.batch, m.channels, m.side, m.side) for _ in range(2))
    sample = torch.arange(m.batch)
    labels = sample % CLASSES
    if OBJECTIVES[kind(objective)].draws == "data":
        return Batch(0.5 * x, labels, sample, None)
    t = torch.rand(m.batch) + 0.1
    return Points(0.5 * other + t.view(-1, 1, 1, 1) * x, t, 0.5 * other, 0.02 * t, labels, None, sample)


def kind(objective: str) -> str:
    """Its name in a recipe."""
    return loading.load(RECIPE).stages[STAGES[objective]].objective.kind
