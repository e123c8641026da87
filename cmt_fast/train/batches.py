"""The rows of a step and their loss: data by position, points of trajectories by round, the objective and its anchor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch
from cmt_kernels import dual
from torch import Tensor

from cmt_fast import schedule
from cmt_fast.config.schema import CmtCm, Stage
from cmt_fast.data import trajectory_store
from cmt_fast.data.loaders import loader
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.guidance import Autoguided, guided
from cmt_fast.engine import Engine
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.perceptual import distance
from cmt_fast.run import resolved
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import checkpoint
from cmt_fast.teacher import solver_record
from cmt_fast.teacher.pool import Pool
from cmt_fast.teacher.precision import Teacher
from cmt_fast.usage.meters import Meter


class BatchProvider:
    """Where a stage's rows come from, and its loss: the objective on its rows plus the anchor on the others."""

    def __init__(
        self,
        work: Workspace,
        name: str,
        stage: Stage,
        engine: Engine,
        meter: Meter | None = None,
        found: checkpoint.Checkpoint | None = None,
    ) -> None:
        """meter: is told what of a step's time goes to the teacher's rollouts, and to waiting for rows.

        found: the checkpoint that the stage goes on from.
        """
        if resolved.trajectory_rows(stage):
            assert stage.trajectories is not None
            stage = dataclasses.replace(
                stage, trajectories=solver_record.settled(work.folder / name, stage.trajectories)
            )
        run, self.stage, self.work, self.index = work.run, stage, work, resolved.INDEX[name]
        self.seed, self.path = run.seed, work.path
        self._within = meter.within if meter else lambda phase: contextlib.nullcontext()
        self.own, self.anchored = resolved.rows(stage)
        self.total, self.grad_accum_steps = schedule.schedule(stage).total, engine.grad_accum_steps
        needs = OBJECTIVES[stage.objective.kind]
        self.draws_data = needs.draws == "data"
        self.loader = loader(run.loader, work.data, run.seed, work.device, self.own) if self.draws_data else None
        self._step, self._rows = -1, (torch.empty(0), None)
        held = functools.cache(lambda name: engine.frozen(work.network(name)))
        self.teacher = None
        if needs.teacher:
            assert stage.teacher is not None
            net, guide = held(stage.teacher), stage.autoguidance
            self.teacher = Autoguided(net, held(guide.network), guide.scale) if guide else None
            self.teacher = self.teacher or guided(net, stage.teacher_guidance)
        wanted = stage.distances()
        self.features = getattr(work.space, "differentiable", None) if "features" in wanted else None
        named = sorted(wanted & set(PERCEPTUAL))
        self.perceptual = distance.load(stage.perceptual, named[0], work.data.shape, work.device) if named else None
        if named == ["latent_lpips"]:
            distance.check_rows(stage.perceptual, work.rows()["normalisation"])
        self.pool, self.trajectories = None, {}
        if resolved.trajectory_rows(stage):
            self.pool = self._cached(name) if resolved.cached(stage) else self._rolled(name, held, found)
            self.pool.keep = self._kept()

    def _cached(self, name: str) -> Pool:
        """Points of trajectories that are on disk: no teacher is there."""
        work, run = self.work, self.work.run
        pool = resolved.pool(run, name, self.stage.trajectories, None, work.data.shape, work.data.classes, work.device)
        folder = resolved.cached(self.stage)
        assert folder
        pool.stock = trajectory_store.reader(folder, run.loader, run.seed, self.index, work.device, pool.count)
        return pool

    def _rolled(self, name: str, held: Callable, found: checkpoint.Checkpoint | None) -> Pool:
        """Points of trajectories that the teacher makes, in the format that the stage began with."""
        work, shape, classes = self.work, self.work.data.shape, self.work.data.classes
        teacher = Teacher(name, self.stage, held, self.path, work.device)
        if found:  # a checkpoint that says nothing is of a version that knew fp32 and tf32 alone
            before = {"precision": "tf32" if self.stage.precision == "tf32" else "fp32"}
            self.trajectories = found.manifest.get("trajectories") or before
            teacher.check(self.trajectories)
        else:
            self.trajectories = teacher.choose(self.seed, self.index, shape, classes)
            if distributed.rank() == 0:
                for line in teacher.lines(self.trajectories):
                    progress.say(f"{name:>8} {line}")
        format, graph = self.trajectories["precision"], not teacher.sharded
        if not graph and work.device.type == "cuda" and distributed.rank() == 0:
            progress.say(f"{name:>8} no CUDA graph of rollouts: the teacher is sharded over processes")
        how = {"computing": teacher.computing(format), "graph": graph}
        return resolved.pool(
            work.run, name, self.stage.trajectories, teacher.net(format), shape, classes, work.device, **how
        )

    def _kept(self) -> tuple[str, Callable] | None:
        """The distance whose features of endpoints are computed once a trajectory, and what computes them.

        Not where both images are augmented: every row draws its own augmentation.
        """
        kinds = [o for o in (self.stage.objective, self.stage.anchor and self.stage.anchor.objective) if o]
        named = {o.distance for o in kinds if isinstance(o, CmtCm)}
        if "features" in named and self.features:
            features = self.features
            return "features", lambda x: [features(x)]
        if self.perceptual and not self.perceptual.augmented and named & set(PERCEPTUAL):
            return min(named & set(PERCEPTUAL)), self.perceptual.features
        return None

    def close(self) -> None:
        """End what reads in the background."""
        for part in (self.loader, self.pool):
            if part:
                part.close()

    def loss(self, engine: Engine, step: int, part: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to differentiate in pass `part` of a step, averaged over its rows, and the scalars to log."""
        random = rng.Random(self.seed, self.index, step)
        nimg = step * self.stage.batch
        world = LossContext(self.path, random, self.teacher, step / self.total, self.features, nimg, self.perceptual)
        mine = slice(distributed.rank() + part * distributed.size(), None, distributed.size() * self.grad_accum_steps)
        rows = torch.arange(self.own, device=self.work.device)[mine]
        drawn = self._data(random, step, rows, part) if self.draws_data else self._points(random, step, rows, rows)
        net = _dropping(engine, random, rows)
        loss, scalars = OBJECTIVES[self.stage.objective.kind].function(net, drawn, self.stage.objective, world)
        scalars = {k: v.mean() for k, v in scalars.items()}
        anchor = self.stage.anchor
        if anchor is None:
            return loss.mean(), scalars
        rows = torch.arange(self.anchored, device=self.work.device)[mine]
        points = self._points(random, step, rows, rows + self.own)
        net = _dropping(engine, random, rows + self.own)
        held, _ = OBJECTIVES[anchor.objective.kind].function(net, points, anchor.objective, world)
        scalars |= {"post_loss": loss.detach().mean(), "anchor_loss": held.detach().mean()}
        share = self.anchored / self.stage.batch
        return (1 - share) * anchor.post_weight * loss.mean() + share * held.mean(), scalars

    def _data(self, random: rng.Random, step: int, rows: Tensor, part: int) -> Batch:
        """This pass's rows: those of the whole step are asked for at once, as loaders read ahead step by step."""
        assert self.loader is not None
        if part == 0 or self._step != step:
            mine = torch.arange(self.own, device=self.loader.place)[distributed.rank() :: distributed.size()]
            with self._within("stalled"):
                self._step, self._rows = step, self.loader.rows(mine + step * self.own)
        x_0, labels = (x if x is None else x[part :: self.grad_accum_steps] for x in self._rows)
        return Batch(x_0, labels, rows, self._drop(random, labels, rows))

    def _points(self, random: rng.Random, step: int, rows: Tensor, sample: Tensor):
        assert self.pool is not None
        with self._within("teacher"):
            points = self.pool.draw(step, rows)
        return points._replace(sample=sample)  # with its label: the teacher rolled it out under that condition

    def _drop(self, random: rng.Random, labels: Tensor | None, sample: Tensor) -> Tensor | None:
        """One mask a batch, for every copy of it."""
        return None if labels is None else random.uniform(rng.DROP, sample) < self.stage.label_dropout


def _dropping(engine: Engine, random: rng.Random, sample: Tensor) -> Callable:
    """The engine; of a network with dropout, with seeds for these rows (B,): every call of a step drops the same."""
    n = getattr(engine.net, "dropouts", 0)
    if not n:
        return engine
    seeds = random.seeds(rng.DROPOUT, sample, n)
    return lambda x, t, r=None, labels=None, drop=None, _=None, *more: engine(
        x, t, r, labels, drop, seeds[: len(dual.value(x))], *more
    )
