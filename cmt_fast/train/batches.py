"""The rows of a step and their loss: data by position, points of trajectories by round, the objective and its anchor.

A part of a step is drawn first (`draw`: rows, times, noise, trajectories, all that the step's number or a loader decides) and
differentiated then (`loss_of`: networks and tensors alone), so that the second half can be one graph that is replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cmt_kernels import dual
from torch import Tensor, nn

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import CmtCm, Feed
from cmt_fast.data import augment, trajectory_store
from cmt_fast.data.classes import drawn
from cmt_fast.data.loaders import loader
from cmt_fast.data.order import Loader
from cmt_fast.data.rows import Rows, opened
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.guidance import Autoguided, guided
from cmt_fast.engine import Engine, Unread
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext, StageContext, sets, taught
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.objectives.rounding import Rounding, split
from cmt_fast.perceptual import distance
from cmt_fast.run.networks import rows_of
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import checkpoint
from cmt_fast.teacher import solver_record
from cmt_fast.teacher.pool import Pool
from cmt_fast.teacher.precision import Teacher
from cmt_fast.usage.meters import Meter


class Drawn(NamedTuple):
    """One part of a step, as tensors: what the objective drew, its rows' seeds of dropout, and the same of the anchor.

    wide: how many of the objective's rows, the first ones, are computed in fp32 whatever the stage's precision is; as a name,
    which is what graphs of the step are told apart by. told: labels (B, n) of what was done to the objective's images, None where
    nothing is.
    """

    own: Any
    seeds: Tensor | None
    anchored: Any = None
    anchored_seeds: Tensor | None = None
    wide: str = "0"
    told: Tensor | None = None


class BatchProvider:
    """Where a stage's rows come from, and its loss: the objective on its rows plus the anchor on the others."""

    def __init__(
        self,
        stage: ResolvedStage,
        engine: Engine,
        data: Rows,
        device: torch.device,
        network: Callable[[str], nn.Module | Unread],
        space: Callable[[], Any] | None = None,
        meter: Meter | None = None,
        found: checkpoint.Checkpoint | None = None,
    ) -> None:
        """network: the name of a finished stage -> its frozen network, read or still to be read; space: what opens the
        extractor of `eval`, where a distance is in its features; meter: is told what of a step's time goes to rollouts and to
        waiting for rows.

        found: the checkpoint that the stage goes on from.
        """
        if stage.trajectory_rows:
            stage = stage.replaced(trajectories=solver_record.settled(stage.folder, stage.trajectories))
        self.resolved, self.stage, self.data, self.device = stage, stage.config, data, device
        self.index, self.seed, self.path = stage.index, stage.seed, stage.path
        self._within = meter.within if meter else lambda phase: contextlib.nullcontext()
        self.own, self.anchored = stage.rows
        self._net = engine.net
        self.rounding: Rounding | None = None  # which rows are in fp32, where the stage's precision is lower
        self.plan, self.grad_accum_steps = stage.schedule, engine.grad_accum_steps
        config, run = stage.config, stage.run
        self.draws_data = OBJECTIVES[config.objective.kind].draws == "data"
        self.together = stage.together if data.classes else 1  # rows of one class that the loader puts together
        self.loader = self._opened(run.loader, data, run.seed) if self.draws_data else None
        self._step, self._rows = -1, (torch.empty(0), None)
        self.redraws: list[tuple[int, int]] = []  # (step, number): from that step on noise and times are drawn anew
        self.held: dict[str, Any] = {}  # frozen networks by the stage that they come from

        def held(name: str) -> Any:
            if name not in self.held:
                self.held[name] = engine.frozen(network(name))
            return self.held[name]

        self.teacher = None
        if taught(config.objective):
            assert config.teacher is not None
            net, guide = held(config.teacher), config.autoguidance
            self.teacher = Autoguided(net, held(guide.network), guide.scale) if guide else None
            self.teacher = self.teacher or guided(net, config.teacher_guidance)
        wanted = config.distances()
        self.features = getattr(space(), "differentiable", None) if space and "features" in wanted else None
        named = sorted(wanted & set(PERCEPTUAL))
        self.perceptual = distance.load(config.perceptual, named[0], data.shape, device) if named else None
        if named == ["latent_lpips"]:
            distance.check_rows(config.perceptual, rows_of(data)["normalisation"])
        self.pool, self.trajectories = None, {}
        if stage.trajectory_rows:
            self.pool = self._cached(stage.cache) if stage.cache else self._rolled(held, found)
            self.pool.keep = self._kept()

    def _opened(self, feed: Feed, data: Rows, seed: int) -> Loader:
        """The loader of this stage's rows. Raises ConfigError where a class has too few for a set."""
        try:
            return loader(feed, data, seed, self.device, self.own, self.together)
        except ConfigError as error:
            raise error.under(self.resolved.name) from None

    def _cached(self, folder: str) -> Pool:
        """Points of trajectories that are on disk: no teacher is there."""
        pool = self.resolved.pool(None, self.data.shape, drawn(self.data), self.device)
        feed = self.resolved.run.loader
        pool.stock = trajectory_store.reader(folder, feed, self.seed, self.index, self.device, pool.count)
        return pool

    def _rolled(self, held: Callable, found: checkpoint.Checkpoint | None) -> Pool:
        """Points of trajectories that the teacher makes, in the precision that the stage began with."""
        name, shape, classes = self.resolved.name, self.data.shape, drawn(self.data)
        teacher = Teacher(name, self.stage, held, self.path, self.device)
        if found:  # a checkpoint that says nothing is of a version that knew fp32 and tf32 alone
            before = {"precision": "tf32" if self.stage.precision == "tf32" else "fp32"}
            self.trajectories = found.manifest.get("trajectories") or before
            teacher.check(self.trajectories)
        else:
            self.trajectories = teacher.choose(self.seed, self.index, shape, classes)
            if distributed.rank() == 0:
                for line in teacher.lines(self.trajectories):
                    progress.say(f"{name:>8} {line}")
        precision, graph = self.trajectories["precision"], not teacher.sharded
        if not graph and self.device.type == "cuda" and distributed.rank() == 0:
            progress.say(f"{name:>8} no CUDA graph of rollouts: the teacher is sharded over processes")
        how = {"computing": teacher.computing(precision), "graph": graph}
        return self.resolved.pool(teacher.net(precision), shape, classes, self.device, **how)

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
        return self.loss_of(engine, self.draw(step, part))

    def every_form(self, engine: Engine, step: int) -> None:
        """The loss of a step as it is, and as it is of where its stage has another form: every kind of call of the network."""
        self.loss(engine, step)
        for at in OBJECTIVES[self.stage.objective.kind].forms(self.stage.objective):
            self.loss_of(engine, self.draw(step, progress=at))

    def draw(self, step: int, part: int = 0, progress: float | None = None) -> Drawn:
        """All of pass `part` of a step but its networks: this is where the step's number is read.

        progress: of the stage, in the place of the step's own.
        """
        random = rng.Random(self.seed, self.index + rng.REDRAWN * self.redraw(step), step)
        progress = self.plan.progress(step) if progress is None else progress
        nimg = self.plan.nimg(step)
        world = LossContext(self.path, random, self.teacher, progress, self.features, nimg, self.perceptual)
        rows, wide = self.mine(part), 0
        given = self._data(random, step, rows, part) if self.draws_data else self._points(random, step, rows, rows)
        if self.rounding:
            given, wide = self.rounding.sorted(given, random, world.progress)
            rows = given.sample
        given, told = self._augmented(given, random) if isinstance(given, Batch) else (given, None)
        own = OBJECTIVES[self.stage.objective.kind].draw(given, self.stage.objective, world)
        seeds = self._seeds(random, rows)
        anchor = self.stage.anchor
        if anchor is None:
            return Drawn(own, seeds, wide=str(wide), told=told)
        rows = self.mine(part, self.anchored)
        points = self._points(random, step, rows, rows + self.own)
        anchored = OBJECTIVES[anchor.objective.kind].draw(points, anchor.objective, world)
        return Drawn(own, seeds, anchored, self._seeds(random, rows + self.own), str(wide), told)

    def redraw(self, step: int) -> int:
        """The number of the draw of noise that a step belongs to: 0 until a stage was rolled back."""
        return next((number for first, number in reversed(self.redraws) if first <= step), 0)

    def loss_of(self, engine: Engine, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of what was drawn, as of `loss`: the same work at every step."""
        world = self.context
        net = _bound(split(engine, engine.wide, int(drawn.wide)), drawn.seeds, drawn.told)
        own = self.stage.objective
        loss, scalars = OBJECTIVES[own.kind].loss(net, drawn.own, own, world)
        scalars = {k: v.mean() for k, v in scalars.items()}
        anchor = self.stage.anchor
        if anchor is None:
            return loss.mean(), scalars
        net = _bound(engine, drawn.anchored_seeds)
        held, _ = OBJECTIVES[anchor.objective.kind].loss(net, drawn.anchored, anchor.objective, world)
        scalars |= {"post_loss": loss.detach().mean(), "anchor_loss": held.detach().mean()}
        share = self.anchored / self.stage.batch
        return (1 - share) * anchor.post_weight * loss.mean() + share * held.mean(), scalars

    @property
    def context(self) -> StageContext:
        """What a loss reads besides what was drawn."""
        return StageContext(self.path, self.teacher, self.features, self.perceptual)

    def mine(self, part: int, of: int | None = None) -> Tensor:
        """Which rows of a step, of `of` or all that the objective has, this process takes in pass `part`. (B,) int64."""
        mine = slice(distributed.rank() + part * distributed.size(), None, distributed.size() * self.grad_accum_steps)
        return torch.arange(self.own if of is None else of, device=self.device)[mine]

    def places(self, step: int, rows: Tensor) -> Tensor:
        """Where rows of a step (B,), of all that the objective has, stand in the order of the data. (B,) int64."""
        place = rows if self.together == 1 else sets.positions(rows, self.own, self.together)
        return place + self.plan.rows_before(step, self.own)

    def _data(self, random: rng.Random, step: int, rows: Tensor, part: int) -> Batch:
        """This pass's rows: those of the whole step are asked for at once, as loaders read ahead step by step."""
        assert self.loader is not None
        if part == 0 or self._step != step:
            mine = torch.arange(self.own, device=self.loader.place)[distributed.rank() :: distributed.size()]
            with self._within("stalled"):
                self._step, self._rows = step, self.loader.rows(self.places(step, mine))
        x_0, labels = (x if x is None else x[part :: self.grad_accum_steps] for x in self._rows)
        drop = self._drop(random, labels, rows)
        if (
            drop is not None and self.stage.label_dropout
        ):  # a teacher, which is told labels alone, goes without them too
            labels = labels.masked_fill(drop, self.data.classes)
        return Batch(x_0, labels, rows, drop)

    def _augmented(self, batch: Batch, random: rng.Random) -> tuple[Batch, Tensor | None]:
        """Images that something was done to, and the labels that tell the network of it."""
        config = self.stage.augment
        if config is None:
            return batch, None
        changes = augment.draw(random, batch.sample, config)
        told = augment.labels(changes, config, tuple(batch.x_0.shape[1:]))
        return batch._replace(x_0=augment.apply(batch.x_0, changes, config)), told

    def _points(self, random: rng.Random, step: int, rows: Tensor, sample: Tensor):
        assert self.pool is not None
        with self._within("teacher"):
            points = self.pool.draw(step, rows, self.redraw(step))
        return points._replace(sample=sample)  # with its label, or the null class: the teacher rolled it out under it

    def _seeds(self, random: rng.Random, sample: Tensor) -> Tensor | None:
        """Of the dropout in these rows (B,), None for a network without: (B, dropouts, 2)."""
        n = getattr(self._net, "dropouts", 0)
        return random.seeds(rng.DROPOUT, sample, n) if n else None

    def _drop(self, random: rng.Random, labels: Tensor | None, sample: Tensor) -> Tensor | None:
        """One mask a batch, for every copy of it."""
        return None if labels is None else random.uniform(rng.DROP, sample) < self.stage.label_dropout


@progress.phase("preparing rows and teachers", quiet=True)
def provider(
    work: Workspace,
    stage: ResolvedStage,
    engine: Engine,
    meter: Meter | None = None,
    found: checkpoint.Checkpoint | None = None,
) -> BatchProvider:
    """The batches of a stage of an opened run; arguments as of BatchProvider."""
    data, network = opened(work.data), functools.partial(work.unread, together=True)
    return BatchProvider(stage, engine, data, work.device, network, lambda: work.judging.space, meter, found)


def _bound(engine: Callable, seeds: Tensor | None, told: Tensor | None = None) -> Callable:
    """The engine with what these rows bring to every call of a step: seeds (B, dropouts, 2), so that all drop the same, and
    what the network is told (B, n) of an augmentation, by name.
    """
    if seeds is None and told is None:
        return engine

    def net(x, t, r=None, labels=None, drop=None, _=None, *more):
        n = len(dual.value(x))
        named = {} if told is None else {"augment": told[:n]}
        return engine(x, t, r, labels, drop, None if seeds is None else seeds[:n], *more, **named)

    return net
