"""A run's network for rows of a shape, and whether another run's network means the same thing here."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from cmt_kernels import through, use
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_fast import models
from cmt_fast.config.schema import Run
from cmt_fast.data.rows import Rows
from cmt_fast.models.deferred import Deferred, deferred
from cmt_fast.models.weightless import weightless
from cmt_fast.run import validation
from cmt_fast.run.absent import AbsentRows


def check(run: Run, shape: tuple[int, ...], classes: int) -> int:
    """Whether a run makes sense for rows of this shape: its stages, and its network, built without memory.

    Returns the network's parameters. Raises ValueError or ConfigError naming the key that is wrong.
    """
    validation.check(run, shape, classes)
    return parameters(run, shape, classes)


def parameters(run: Run, shape: tuple[int, ...], classes: int) -> int:
    """Parameters of a run's network on rows of this shape, built without memory. Raises ValueError where they do not fit."""
    return sum(p.numel() for p in shapes_of(run, shape, classes).parameters())


def shapes_of(run: Run, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A run's network with shapes alone, on the meta device. Raises ValueError where it does not fit the rows."""
    with weightless():
        return fresh_network(run, shape, classes)


def attentions(run: Run, shape: tuple[int, ...], classes: int) -> list[tuple[int, int]]:
    """(tokens, head dim) of every attention of a run's network on rows of this shape, found without memory."""
    seen: set[tuple[int, int]] = set()

    def watched(_: str, attend: Callable) -> Callable:
        def call(qkv: Tensor) -> Tensor:
            seen.add((qkv.shape[1], qkv.shape[-1]))
            return attend(qkv)

        return call

    with weightless(), sdpa_kernel(SDPBackend.MATH), use("reference"), through(watched, "other", ("attention",)):
        net, one = fresh_network(run, shape, classes), torch.ones(1)
        net(torch.ones(1, *shape), one, one, torch.ones(1, dtype=torch.int64) if classes else None)
    return sorted(seen)


def fresh_network(run: Run, shape: tuple[int, ...], classes: int, seed: int = 0) -> nn.Module:
    """A run's network for rows of this shape, initialised from a seed; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(run.model, run.path, run.sigma_data, shape, classes)


def deferred_network(run: Run, shape: tuple[int, ...], classes: int, seed: int = 0) -> Deferred:
    """The same network without memory for its parameters, and what will draw them."""
    return deferred(lambda: models.build(run.model, run.path, run.sigma_data, shape, classes), seed)


def rows_of(data: Rows) -> dict:
    """What a network was trained on, as run.json keeps it: shape, classes, normalisation, and the source's numbers of the
    classes where those are others; of absent rows what is known.
    """
    if isinstance(data, AbsentRows):
        return data.known
    own = {"shape": data.shape, "classes": data.classes, "normalisation": getattr(data, "normalisation", None)}
    own |= {"class_ids": ids} if (ids := getattr(data, "class_ids", ())) else {}
    return json.loads(json.dumps(own))
