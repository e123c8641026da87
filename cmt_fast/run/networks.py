"""A run's network for rows of a shape, and whether another run's network means the same thing here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cmt_fast import models
from cmt_fast.config.schema import Run
from cmt_fast.data.rows import Rows
from cmt_fast.run import validation


def check(run: Run, shape: tuple[int, ...], classes: int) -> int:
    """Whether a run makes sense for rows of this shape: its stages, and its network, built without memory.

    Returns the network's parameters. Raises ValueError or ConfigError naming the key that is wrong.
    """
    validation.check(run, shape, classes)
    return parameters(run, shape, classes)


def parameters(run: Run, shape: tuple[int, ...], classes: int) -> int:
    """Parameters of a run's network on rows of this shape, built without memory. Raises ValueError where they do not fit."""
    with _NoDraws(), torch.device("meta"):
        return sum(p.numel() for p in _network(run, shape, classes).parameters())


# methods that put numbers into a tensor
WRITES = ("normal_", "uniform_", "erfinv_", "clamp_", "fill_", "zero_", "mul_", "add_", "copy_")


class _NoDraws(TorchFunctionMode):
    """Weights without memory need no numbers, and drawing them there imports a compiler for seconds."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WRITES:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _network(run: Run, shape: tuple[int, ...], classes: int, seed: int = 0) -> nn.Module:
    """A run's network for rows of this shape, initialised from a seed; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(run.model, run.path, run.sigma_data, shape, classes)


def rows_of(data: Rows) -> dict:
    """What a network was trained on, as run.json keeps it: shape, classes, normalisation."""
    own = {"shape": data.shape, "classes": data.classes, "normalisation": getattr(data, "normalisation", None)}
    return json.loads(json.dumps(own))
