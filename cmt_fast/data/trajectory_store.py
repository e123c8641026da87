"""Trajectories of a teacher on disk: a store (data/latents.py) whose rows are all nodes of one, with its label.

Students that share a teacher read the same trajectories, and need neither it nor its work. On VE a node is stored times
c_in = 1/sqrt(sigma_data^2 + t^2), so that in fp16 noise of standard deviation 80 loses no more bits than an image does.
The index says what the rows depend on, so a store that a recipe does not mean is refused. WebDataset shards made of
such a store by `cmt data shards` are one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Feed, Run, Stage
from cmt_fast.data import classes
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.latents import Index, Rolled, Store, read_index, said
from cmt_fast.data.loaders import loader
from cmt_fast.data.rows import Rows
from cmt_fast.data.shards import Shards
from cmt_fast.data.writing import Layout, Writer, key_of
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.labels import Some
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.solvers import table
from cmt_fast.runtime import distributed

DTYPES = {"fp16": "float16", "fp32": "float32"}


class _Nodes:
    """What makes a store's rows trajectories: their nodes as they were, in an order that belongs to a stage."""

    index: Index
    n: int
    stage: int

    @property
    def rolled(self) -> Rolled:
        """What the trajectories are."""
        assert self.index.trajectories is not None
        return self.index.trajectories

    def finish(self, stored: Tensor, index: Tensor, draw: Tensor | None, seed: int) -> Tensor:
        """What `read` gave, on any device -> nodes (B, N + 1, *shape) float32."""
        r = self.rolled
        x = stored.float().view(len(stored), len(r.times), *r.shape)
        return x / _scales(r, x) if r.spread else x


class Cache(_Nodes, Store):
    """Trajectories in plain files. Raises DatasetError as Store does."""

    def order(self, random: rng.Random) -> Tensor:
        """The trajectories of one epoch, (n,) int64: at random, another order in every stage."""
        return random._replace(stage=self.stage).permutation(rng.DATA, self.n)


class ShardCache(_Nodes, Shards):
    """Trajectories in WebDataset shards. Raises DatasetError as Shards does."""

    def order(self, random: rng.Random) -> Tensor:
        """As Shards', another order in every stage."""
        return Shards.order(self, random._replace(stage=self.stage))


class Origin(NamedTuple):
    """What the index of a store says of its rows' origin: the run and its teacher, and the names of classes."""

    source: str
    class_names: tuple[str, ...]


class Reader(NamedTuple):
    """Trajectories as a pool takes them, by either loader."""

    store: Cache | ShardCache
    loader: Any

    def rows(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """position: (B,), counted from the start of the stage -> nodes (B, N + 1, ...), labels (B,) or None."""
        return self.loader.rows(position)

    def close(self) -> None:
        """End what reads in the background."""
        self.loader.close()


def opened(folder: str | Path, stage: int = 0) -> Cache | ShardCache:
    """The trajectories in a folder, in the order of a stage. Raises ConfigError for anything else."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"trajectories.cache: {str(folder)!r} is not a folder; `cmt trajectories` writes one")
    index = read_index(folder)
    if index.trajectories is None:
        raise ConfigError(f"trajectories.cache: {str(folder)!r} holds {index.kind} rows of data, no trajectories")
    store = (ShardCache if index.shards[0].file.endswith(".tar") else Cache)(folder)
    store.stage = stage
    return store


def reader(folder: str | Path, config: Feed, seed: int, stage: int, device: torch.device, each: int) -> Reader:
    """A stage's reader of `each` trajectories a round; the rounds of an epoch take every trajectory once."""
    store = opened(folder, stage)
    made = loader(config, store, seed, device, each)
    made.AHEAD = 1  # rounds are large
    return Reader(store, made)


def meant(run: Run, stage: Stage, data: Rows) -> dict[str, Any]:
    """What a recipe says of a stage's trajectories on a data set: all that they depend on but the teacher's weights."""
    t, guide = stage.trajectories, stage.autoguidance
    assert t is not None
    plan = table(ProbabilityPath(run.path, run.sigma_data), t.solver, t.nfe, t.t_max, t.t_min, t.order, t.shift)
    auto = guide.scale if guide and guide.trajectories else None
    return {
        "shape": data.shape,
        "classes": data.classes,
        "drawn": drawn.labels if isinstance(drawn := classes.drawn(data), Some) else (),
        "path": f"{run.path}, sigma_data {run.sigma_data}" if run.path == "ve" else run.path,
        "times": plan.times,
        "solver": f"{t.solver} of order {t.order}, {plan.nfe} calls from {t.t_max} to {t.t_min}, shift {t.shift}",
        "solver_xxh3_128": key_of(plan),
        "guidance": f"autoguidance {auto}" if auto else f"classifier-free {t.guidance}" if t.guidance != 1 else "none",
        "label_dropout": stage.trajectory_dropout,
    }


def check(folder: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError naming what differs between stored trajectories and what a recipe means, as of `meant`.

    The "teacher" is compared where `wanted` has it. Returns the store's facts and its teacher, which a run keeps.
    """
    store = opened(folder)
    found = store.rolled
    have = {"shape": tuple(found.shape), "classes": store.classes}
    compared = ("drawn", "path", "solver_xxh3_128", "guidance", "label_dropout", "teacher")
    have |= {key: getattr(found, key) for key in compared}
    for key, theirs in have.items():
        if key in wanted and theirs != wanted[key]:
            name = key.removesuffix("_xxh3_128")
            ours = wanted[name]
            theirs = found.solver if name == "solver" else theirs
            if name == "drawn":
                name, theirs, ours = "choice of start labels", *map(_range, (theirs, ours))
            raise ConfigError(
                f"trajectories.cache: {folder} is of other trajectories: its {name} is {theirs}, this recipe's is {ours}"
            )
    return {**store.facts, "teacher": found.teacher}


def _range(drawn: tuple[int, ...]) -> str:
    """Classes that start labels are drawn from, in words."""
    return (
        f"{len(drawn)} classes, {', '.join(map(str, drawn[:8]))}{' ...' * (len(drawn) > 8)}" if drawn else "all classes"
    )


def _scales(r: Rolled, like: Tensor) -> Tensor:
    """What nodes are multiplied with when they are stored, (1, N + 1, 1, ...)."""
    times = torch.tensor(r.times, dtype=torch.float64)
    scales = torch.rsqrt(r.spread**2 + times.square())
    return scales.to(like.device, like.dtype).view(1, -1, *[1] * (like.ndim - 2))


def write(
    out: Path,
    n: int,
    rolled: Rolled,
    origin: Origin,
    dtype: str,
    shard_rows: int,
    roll: Callable[[int, int], tuple[Tensor, Tensor | None]],
    tell: Callable[[int], None],
) -> Index | None:
    """Write OUT, or go on with it; shards are dealt over ranks. Returns the index on rank 0.

    roll: first, count -> nodes (N + 1, count, ...) and labels of those trajectories, a function of first and count
    alone; tell: so many more of this rank's are there. Raises DatasetError where OUT cannot be written.
    """
    writer, rank = Writer(out), distributed.rank()
    if rank == 0:
        writer.start()
    distributed.barrier()
    wide = len(rolled.shape) == 3
    shape = (
        (len(rolled.times) * rolled.shape[0], *rolled.shape[1:])
        if wide
        else (len(rolled.times), 1, math.prod(rolled.shape))
    )
    layout = Layout("mean", DTYPES[dtype], shape)
    facts = said(TypeAdapter(Rolled).dump_python(rolled, mode="json"))
    firsts = range(0, n, shard_rows)
    keys = [key_of(facts, dtype, first, min(shard_rows, n - first)) for first in firsts]
    with writer.lock_together():
        for k in range(rank, len(firsts), distributed.size()):
            count = min(shard_rows, n - firsts[k])
            if writer.record(k, keys[k]) is None:
                nodes, labels = roll(firsts[k], count)
                x = nodes.transpose(0, 1)
                x = x * _scales(rolled, x) if rolled.spread else x
                if not torch.isfinite(x).all():
                    raise DatasetError(f"{out}: trajectories {firsts[k]} to {firsts[k] + count} are not finite")
                with writer.shard(k, layout, keys[k]) as rows:
                    ys = [None] * count if labels is None else labels.tolist()
                    rows.add(x.reshape(count, *shape).cpu().numpy(), ys, str(out))
            tell(count)
        distributed.barrier()
        if rank:
            return None
        about = {
            "flips": False,
            "class_names": origin.class_names,
            "vae": "",
            "vae_xxh3_128": "",
            "crop": "",
            "source": origin.source,
        }
        return writer.finish(layout, keys, about | {"trajectories": facts})
