"""The training loop: one function for every stage.

A stage starts from the EMA of the stage before, draws rows of data or points of the teacher's
trajectories, and takes optimizer steps; every step's numbers are a function of (seed, stage, step), so a
killed run that is started again ends with the same weights, EMA and metrics as one that was not.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import torch
from cmt_kernels import dual
from torch import Tensor

from cmt_fast import checkpoint, compiled, config, distributed, perceptual, pictures, rng, stages, trajectories
from cmt_fast.data import loader
from cmt_fast.engine import LocalEngine, named
from cmt_fast.log import Log, say
from cmt_fast.objectives import ROWS, Batch, World
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.schema import PowerEma, Run, Stage
from cmt_fast.solvers import Autoguided, guided
from cmt_fast.workspace import Workspace


class Stopped(SystemExit):
    """The process was asked to stop; a checkpoint is on disk. Exit code 128 + signal."""


def train(work: Workspace, names: list[str]) -> None:
    """Train the named stages of a run in order; finished ones are passed over, unfinished ones go on."""
    with work.lock(), _signals() as asked:
        work.claim()
        for name in names:
            train_stage(work, name, asked)


def train_stage(work: Workspace, name: str, asked: list[int]) -> None:
    """One stage, from its start or its last checkpoint to its end. Raises FloatingPointError when the loss is not finite."""
    run, folder = work.run, work.folder / name
    stage = run.stage(name)
    assert stage is not None
    plan = stages.schedule(stage)
    if stage.batch % distributed.size():
        raise config.ConfigError(f"{name}.batch: {stage.batch} does not divide over {distributed.size()} processes")
    found = checkpoint.latest(folder)
    if found and found.manifest.get("done"):
        if distributed.rank() == 0:
            say(f"{name:>8} done ({found.manifest['nimg']} images)")
        return
    differs = config.changed(found.manifest.get("data", work.data.facts), work.data.facts) if found else []
    if differs:
        raise config.ConfigError(f"data: {name} has begun on other rows ({'; '.join(differs)}); choose another --out")
    engine = LocalEngine(work.build(), stage, work.device)
    lineage = _parent(work, stage, engine, found is None)
    others = work.others(stage)
    wall = {"train_s": 0.0, "eval_s": 0.0}
    if found:
        moved = config.changed(found.manifest.get("others", {}), others)
        if moved:
            raise config.ConfigError(f"{name}.{moved[0]}: has changed since this stage began; start it in a new folder")
        engine.load({f: found.tensors(f) for f in engine.state()}, found.manifest["step"])
        wall = dict(found.manifest["wall"])
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, engine.step_count, plan.total, name, distributed.rank() > 0, run.tensorboard)
    source = None
    try:
        source = Source(work, name, stage)
        if stage.compile:
            compiled.guard(engine, lambda: source.loss(engine, engine.step_count), f"{name}.compile")
        sums: dict[str, Tensor] = {}
        clock = time.perf_counter()
        for step in range(engine.step_count, plan.total):
            loss, scalars = source.loss(engine, step)
            engine.backward(loss)
            lr = plan.lr(stage, step)
            scalars["grad_norm"] = engine.step(lr)
            for key, value in (("loss", loss.detach()), *scalars.items()):
                sums[key] = sums[key] + value if key in sums else value
            n, last, stop = step + 1, step + 1 == plan.total, 0
            if n % plan.log_every == 0 or last:
                wall["train_s"] += time.perf_counter() - clock
                count = n - (n - 1) // plan.log_every * plan.log_every
                means = {k: float(distributed.mean_(v.clone().double()) / count) for k, v in sums.items()}
                sums = {}
                if not all(map(_finite, means.values())):
                    raise FloatingPointError(f"{name}: loss {means['loss']} at step {n}; the last checkpoint is sound")
                speed = n * stage.batch / wall["train_s"]
                log.row("train", n, n * stage.batch, {**means, "lr": lr}, {**wall, "images_per_s": speed})
                log.advance(n, f"loss {means['loss']:.4g}  {speed:.0f} img/s")
                clock = time.perf_counter()
                _watch(work, name, stage, engine, plan, n, last, log)
                wall["eval_s"] += time.perf_counter() - clock
                clock = time.perf_counter()
                stop = distributed.largest(asked[0] if asked else 0)
            if n % plan.checkpoint_every == 0 or last or stop:
                log.commit()
                _save(work, name, engine, n, last, lineage, others, wall)
                clock = time.perf_counter()
                if stop and not last:
                    raise Stopped(128 + stop)
    finally:
        log.close()
        if source:
            source.close()


class Source:
    """Where a stage's rows come from, and its loss: the objective on its rows plus the anchor on the others."""

    def __init__(self, work: Workspace, name: str, stage: Stage) -> None:
        run, self.stage, self.work, self.index = work.run, stage, work, stages.INDEX[name]
        self.seed, self.path = run.seed, work.path
        self.own, self.anchored = stages.rows(stage)
        self.total = stages.schedule(stage).total
        self.draws_data = ROWS[stage.objective.kind].draws == "data"
        self.loader = loader(run.loader, work.data, run.seed, work.device, self.own) if self.draws_data else None
        if self.loader:
            mine = slice(distributed.rank(), None, distributed.size())
            self.positions = torch.arange(self.own, device=self.loader.place)[mine]
        net = work.network(stage.teacher) if stage.teacher else None
        guide = stage.autoguidance
        weaker = Autoguided(net, work.network(guide.network), guide.scale) if net and guide else None
        self.teacher = weaker or guided(net, stage.teacher_guidance) if net else None
        self.pool = None
        if stages.trajectory_rows(stage):
            assert stage.trajectories is not None
            rolled = weaker if guide and guide.trajectories else None
            teacher = rolled or guided(net, stage.trajectories.guidance)
            self.pool = stages.pool(run, name, teacher, work.data.shape, work.data.classes, work.device)
        wanted = stage.distances()
        self.features = getattr(work.space, "differentiable", None) if "features" in wanted else None
        named = sorted(wanted & set(PERCEPTUAL))
        self.perceptual = perceptual.load(stage.perceptual, named[0], work.data.shape, work.device) if named else None

    def close(self) -> None:
        """End what reads in the background."""
        if self.loader:
            self.loader.close()

    def loss(self, engine: LocalEngine, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to differentiate, averaged over this rank's rows, and the scalars to log."""
        random = rng.Random(self.seed, self.index, step)
        nimg = step * self.stage.batch
        world = World(self.path, random, self.teacher, step / self.total, self.features, nimg, self.perceptual)
        mine = slice(distributed.rank(), None, distributed.size())
        rows = torch.arange(self.own, device=self.work.device)[mine]
        drawn = self._data(random, step, rows) if self.draws_data else self._points(random, step, rows, rows)
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

    def _data(self, random: rng.Random, step: int, rows: Tensor) -> Batch:
        assert self.loader is not None
        x_0, labels = self.loader.rows(self.positions + step * self.own)
        return Batch(x_0, labels, rows, self._drop(random, labels, rows))

    def _points(self, random: rng.Random, step: int, rows: Tensor, sample: Tensor):
        assert self.pool is not None
        points = self.pool.draw(step, rows)
        return points._replace(drop=self._drop(random, points.labels, sample), sample=sample)

    def _drop(self, random: rng.Random, labels: Tensor | None, sample: Tensor) -> Tensor | None:
        """One mask a batch, for every copy of it."""
        return None if labels is None else random.uniform(rng.DROP, sample) < self.stage.label_dropout


def _dropping(engine: LocalEngine, random: rng.Random, sample: Tensor) -> Callable:
    """The engine; of a network with dropout, with seeds for these rows (B,): every call of a step drops the same."""
    n = getattr(engine.net, "dropouts", 0)
    if not n:
        return engine
    seeds = random.seeds(rng.DROPOUT, sample, n)
    return lambda x, t, r=None, labels=None, drop=None, _=None, *more: engine(
        x, t, r, labels, drop, seeds[: len(dual.value(x))], *more
    )


def _parent(work: Workspace, stage: Stage, engine: LocalEngine, fresh: bool) -> dict | None:
    """Start from the parent stage's EMA, and say in the lineage which file that was."""
    if stage.start is None:
        return None
    weights, manifest = work.weights(stage.start)
    if fresh:
        engine.start_from(weights)
    return {
        "stage": stage.start,
        "step": manifest["step"],
        "nimg": manifest["nimg"],
        "config": manifest["config"],
        "ema": manifest["files"]["ema-0.safetensors"]["xxh3_128"],
        "parent": manifest["parent"],
    }


def _save(work: Workspace, name: str, engine: LocalEngine, step: int, last: bool, lineage, others, wall) -> None:
    if distributed.rank() == 0:
        stage = work.run.stage(name)
        about = {
            "stage": name,
            "nimg": step * stage.batch,
            "done": last,
            "recipe": work.run.name,
            "config": config.stage_digest(work.run, name, others),
            "data": work.data.facts,
            "parent": lineage,
            "others": others,
            "wall": wall,
        }
        checkpoint.save(work.folder / name, step, engine.state(), about)
    distributed.barrier()


def _watch(
    work: Workspace, name: str, stage: Stage, engine, plan: stages.Schedule, n: int, last: bool, log: Log
) -> None:
    """What is looked at during training: figures by all ranks together, pictures and EMA snapshots by rank 0."""
    due = lambda every: every and (n % every == 0 or last)
    net = None
    if due(plan.eval_every):
        net = engine.average()
        figures = work.evaluate(net, work.run.eval.steps, work.run.eval.n_during, quiet=True)
        log.row("eval", n, n * stage.batch, {"steps": figures})
    if distributed.rank() == 0:
        if due(plan.grid_every) or last:
            draw_grid(work, net or engine.average(), name, n)
        if due(plan.snapshot_every):
            powers = [(i, p) for i, p in enumerate(stage.ema) if isinstance(p, PowerEma)]
            for i, profile in powers:
                tensors = named(engine.net, engine.emas[i])
                about = {"stage": name, "sigma_rel": profile.sigma_rel, "done": False}
                checkpoint.save(work.folder / name / "snapshots" / f"ema-{i}", n, {"ema": tensors}, about, keep=1000)
    distributed.barrier()


def draw_grid(work: Workspace, net, name: str, step: int) -> None:
    """The same noise through 1, 2 and many steps: RUN/stage/grids/step.png."""
    run, n = work.run, 10 if len(work.data.shape) == 3 else 1500
    rows = [(f"{k} step{'s' * (k > 1)}", work.setting.generate(net, k, n, run.eval.seed)) for k in run.eval.steps]
    stage = run.stage(name)
    before = "pre" if checkpoint.steps(work.stage_dir("pre")) else None
    named = stage.teacher or before if name != "pre" else None
    if named or name == "pre":
        teacher, title = (work.network(named), "teacher") if named else (net, "solver")
        drawn = work.setting.generate(teacher, run.sampler.teacher_steps, n, run.eval.seed, solver=True)
        rows.append((f"{title}, {run.sampler.teacher_steps}", drawn))
    seen = [(title, *work.visible(x)) for title, x in rows]
    pictures.grid(
        [(f"{title}\n{note}", x) for title, x, note in seen], work.folder / name / "grids" / f"{step:08d}.png"
    )


def _finite(x: float) -> bool:
    return abs(x) < float("inf")


class _signals:
    """Inside: SIGTERM, SIGINT and SIGUSR1 are noted in the returned list instead of ending the process."""

    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self) -> list[int]:
        asked: list[int] = []
        self.before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in self.kinds}
        return asked

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def cost(run: Run, name: str) -> dict[str, float]:
    """Images, steps and network forwards of a stage (backward counted as two): what --dry-run prints.

    A forward is one whatever the network's size: a small teacher's or guide's is counted like the student's.
    """
    stage = run.stage(name)
    assert stage is not None
    plan, (own, anchored) = stages.schedule(stage), stages.rows(stage)
    needs = ROWS[stage.objective.kind]
    forwards = own * needs.forwards + anchored * 3.0
    o = stage.objective
    if o.kind in ("meanflow", "imeanflow"):
        forwards += own * o.ratio * (1 if o.kind == "meanflow" else 2)
        if (o.omega, o.kappa) != (1.0, 0.0):
            forwards += own * (1 + (o.ratio if o.kappa and o.kind == "meanflow" else 0))
    if needs.teacher:
        calls = 2 if o.kind == "ecd" and o.step == "heun" else 1
        forwards += own * calls * (1 if stage.teacher_guidance == 1 and not stage.autoguidance else 2)
    points = stages.trajectory_rows(stage)
    if points and stage.trajectories:
        t = stage.trajectories
        each = trajectories.drawn(t, run.path, t.nfe // (2 if t.solver == "heun" else 1))
        alone = t.guidance == 1 and not (stage.autoguidance and stage.autoguidance.trajectories)
        forwards += points * t.nfe / each * (1 if alone else 2)
    return {"steps": plan.total, "images": plan.total * stage.batch, "forwards": plan.total * forwards}
