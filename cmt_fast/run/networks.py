"""A run's network for rows of a shape, and whether another run's network means the same thing here."""

from __future__ import annotations

import json

import torch
from torch import nn

from cmt_fast import models
from cmt_fast.config.schema import Run
from cmt_fast.data.rows import Rows
from cmt_fast.models.weightless import weightless
from cmt_fast.run import validation


def check(run: Run, shape: tuple[int, ...], classes: int) -> int:
    """Whether a run makes sense for rows of this shape: its stages, and its network, built without memory.

    Returns the network's parameters. Raises ValueError or ConfigError naming the key that is wrong.
    """
    validation.check(run, shape, classes)
    return parameters(run, shape, classes)


def parameters(run: Run, shape: tuple[int, ...], classes: int) -> int:
    """Parameters of a run's network on rows of this shape, built without memory. Raises ValueError where they do not fit."""
    with weightless():
        return sum(p.numel() for p in fresh_network(run, shape, classes).parameters())


def fresh_network(run: Run, shape: tuple[int, ...], classes: int, seed: int = 0) -> nn.Module:
    """A run's network for rows of this shape, initialised from a seed; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(run.model, run.path, run.sigma_data, shape, classes)


def rows_of(data: Rows) -> dict:
    """What a network was trained on, as run.json keeps it: shape, classes, normalisation."""
    own = {"shape": data.shape, "classes": data.classes, "normalisation": getattr(data, "normalisation", None)}
    return json.loads(json.dumps(own))
