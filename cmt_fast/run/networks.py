"""A run's network for rows of a shape, and whether another run's network means the same thing here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from cmt_kernels import through, use
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_fast import models
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.data import classes as in_data
from cmt_fast.data.rows import Rows
from cmt_fast.models.deferred import Deferred, deferred
from cmt_fast.models.weightless import weightless
from cmt_fast.run import validation
from cmt_fast.run.absent import AbsentRows
from cmt_fast.run.folder import about_run, stored_run


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


def fits(name: str, mine: Run, data: Rows) -> None:
    """Raises ConfigError unless the network RUN/STAGE means the same thing here: path, scale of the data, rows.

    Its size may be another. A run whose rows are not on record must have the same data in its recipe; what is not on
    record of them, because they were not there when its network was imported, is not compared.
    """
    folder = Path(name).parent
    other = stored_run(folder)
    pairs = [(key, getattr(other, key), getattr(mine, key)) for key in ("path", "sigma_data")]
    stored = about_run(folder).get("rows")
    if stored is None:
        pairs.append(("data", loading.dump(other)["data"], loading.dump(mine)["data"]))
    else:
        pairs += [(key, stored.get(key), value) for key, value in rows_of(data).items() if key in stored]
    for key, theirs, ours in pairs:
        if key == "class_ids" and None in (theirs, ours):
            continue  # one of the two says what its classes are in the other's numbers
        if theirs != ours:
            hint = f"; {in_data.asks(data, theirs)}" if key == "classes" and isinstance(theirs, int) else ""
            raise ConfigError(
                f"{name}: its {key} is {theirs}, this run's is {ours}; its network cannot be read here{hint}"
            )
