"""The rows of a step and their loss: data by position, points of trajectories by round, the objective and its anchor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from cmt_kernels import dual
from torch import Tensor

from cmt_fast import distributed, perceptual, rng, stages, tuning
from cmt_fast.accounting import Meter
from cmt_fast.data import loader
from cmt_fast.engine import Engine
from cmt_fast.objectives import ROWS, Batch, World
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.schema import Stage
from cmt_fast.solvers import Autoguided, Net, guided
from cmt_fast.workspace import Workspace


def teachers(stage: Stage, held: Callable[[str], Net]) -> tuple[Net | None, Net | None]:
    """What takes a teacher's steps and what is rolled out, each under its own guidance; held: stage -> its network."""
    if not stage.teacher:
        return None, None
    net, guide = held(stage.teacher), stage.autoguidance
    weaker = Autoguided(net, held(guide.network), guide.scale) if guide else None
    rolled = weaker if guide and guide.trajectories else None
    if stage.trajectories:
        rolled = rolled or guided(net, stage.trajectories.guidance)
    return weaker or guided(net, stage.teacher_guidance), rolled


class Source:
    """Where a stage's rows come from, and its loss: the objective on its rows plus the anchor on the others."""

    def __init__(self, work: Workspace, name: str, stage: Stage, engine: Engine, meter: Meter | None = None) -> None:
        """meter: is told what of a step's time goes to the teacher's rollouts, and to waiting for rows."""
        run, self.stage, self.work, self.index = work.run, stage, work, stages.INDEX[name]
        self.seed, self.path = run.seed, work.path
        self._within = meter.within if meter else lambda phase: contextlib.nullcontext()
        self.own, self.anchored = stages.rows(stage)
        self.total, self.passes = stages.schedule(stage).total, engine.passes
        self.draws_data = ROWS[stage.objective.kind].draws == "data"
        self.loader = loader(run.loader, work.data, run.seed, work.device, self.own) if self.draws_data else None
        self._step, self._rows = -1, (torch.empty(0), None)
        held = lambda name: engine.frozen(work.network(name))
        self.teacher, rolled = teachers(stage, held)
        self.pool = None
        if stages.trajectory_rows(stage):
            assert stage.trajectories is not None
            how = tuning.settled(work.folder / name, stage.trajectories)
            self.pool = stages.pool(run, name, how, rolled, work.data.shape, work.data.classes, work.device)
        wanted = stage.distances()
        self.features = getattr(work.space, "differentiable", None) if "features" in wanted else None
        named = sorted(wanted & set(PERCEPTUAL))
        self.perceptual = perceptual.load(stage.perceptual, named[0], work.data.shape, work.device) if named else None
        if named == ["latent_lpips"]:
            perceptual.check_rows(stage.perceptual, work.rows()["normalisation"])

    def close(self) -> None:
        """End what reads in the background."""
        if self.loader:
            self.loader.close()

    def loss(self, engine: Engine, step: int, part: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to differentiate in pass `part` of a step, averaged over its rows, and the scalars to log."""
        random = rng.Random(self.seed, self.index, step)
        nimg = step * self.stage.batch
        world = World(self.path, random, self.teacher, step / self.total, self.features, nimg, self.perceptual)
        mine = slice(distributed.rank() + part * distributed.size(), None, distributed.size() * self.passes)
        rows = torch.arange(self.own, device=self.work.device)[mine]
        drawn = self._data(random, step, rows, part) if self.draws_data else self._points(random, step, rows, rows)
        net = _dropping(engine, random, rows)
        loss, scalars = ROWS[self.stage.objective.kind].function(net, drawn, self.stage.objective, world)
        scalars = {k: v.mean() for k, v in scalars.items()}
        anchor = self.stage.anchor
        if anchor is None:
            return loss.mean(), scalars
        rows = torch.arange(self.anchored, device=self.work.device)[mine]
        points = self._points(random, step, rows, rows + self.own)
        net = _dropping(engine, random, rows + self.own)
        held, _ = ROWS[anchor.objective.kind].function(net, points, anchor.objective, world)
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
        x_0, labels = (x if x is None else x[part :: self.passes] for x in self._rows)
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
