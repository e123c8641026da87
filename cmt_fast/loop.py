"""The training loop: one function for every stage.

A stage starts from the EMA of the stage before, draws rows of data or points of the teacher's
trajectories, and takes optimizer steps; every step's numbers are a function of (seed, stage, step), so a
killed run that is started again ends with the same weights, EMA and metrics as one that was not.
"""

from __future__ import annotations

import signal
import time

import torch
from torch import Tensor

from cmt_fast import checkpoint, compiled, config, distributed, pictures, rng, stages, trajectories
from cmt_fast import engine as engines
from cmt_fast.data import Loader
from cmt_fast.engine import Engine
from cmt_fast.log import Log, say
from cmt_fast.objectives import ROWS, Batch, World
from cmt_fast.schema import PowerEma, Run, Stage
from cmt_fast.solvers import guided
from cmt_fast.workspace import Workspace

LOOK_S = 5.0  # seconds between looks for a signal: torchrun gives its processes 30 to save and end


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
    passes = stages.passes(run, name, distributed.size())
    found = checkpoint.latest(folder)
    if found and found.manifest.get("done"):
        if distributed.rank() == 0:
            say(f"{name:>8} done ({found.manifest['nimg']} images)")
        return
    choice = work.sizing(name)
    if run.engine != "local" and distributed.rank() == 0:
        for line in choice.lines(work.parameters, distributed.size()):
            say(f"{name:>8} {line}")
    engine = engines.build(run, work.build(), stage, work.device, passes, choice)
    lineage = _parent(work, stage, engine, found is None)
    wall = {"train_s": 0.0, "eval_s": 0.0}
    if found:
        try:
            engine.load({f: found.stream(f) for f in engine.state()}, found.manifest["step"])
        except KeyError as error:
            raise checkpoint.CheckpointError(f"{found.folder}: holds no {error}; it is of another version") from None
        wall = dict(found.manifest["wall"])
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, engine.step_count, plan.total, name, distributed.rank() > 0, run.tensorboard)
    try:
        source = Source(work, name, stage, engine)
        if stage.compile:
            compiled.guard(engine, lambda: source.loss(engine, engine.step_count), f"{name}.compile")
        sums = _resumed(found)
        look_every, clock = 1, time.perf_counter()
        for step in range(engine.step_count, plan.total):
            for part in range(passes):
                loss, scalars = source.loss(engine, step, part)
                engine.backward(loss)
                for key, value in (("loss", loss.detach()), *scalars.items()):
                    sums[key] = sums.get(key, 0.0) + value.double() / passes
            lr = plan.lr(stage, step)
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + engine.step(lr).double()
            n, last = step + 1, step + 1 == plan.total
            row = n % plan.log_every == 0 or last
            # a look costs a collective call and waits for the device: every row, and every LOOK_S between
            stop = distributed.largest(asked[0] if asked else 0) if row or n % look_every == 0 else 0
            if row or stop:
                wall["train_s"] += time.perf_counter() - clock
                clock = time.perf_counter()
            if row:
                count = n - (n - 1) // plan.log_every * plan.log_every
                means = {k: float(distributed.mean_(v.clone()) / count) for k, v in sums.items()}
                sums = {}
                if not all(map(_finite, means.values())):
                    raise FloatingPointError(f"{name}: loss {means['loss']} at step {n}; the last checkpoint is sound")
                speed = n * stage.batch / wall["train_s"]
                log.row("train", n, n * stage.batch, {**means, "lr": lr}, {**wall, "images_per_s": speed})
                log.advance(n, f"loss {means['loss']:.4g}  {speed:.0f} img/s")
                look_every = distributed.smallest(max(1, int(LOOK_S * n / wall["train_s"])))
                _watch(work, name, stage, engine, plan, n, last, log)
                wall["eval_s"] += time.perf_counter() - clock
                clock = time.perf_counter()
            if n % plan.checkpoint_every == 0 or last or stop:
                log.commit()
                _save(work, name, engine, n, last, lineage, wall, sums)
                clock = time.perf_counter()
                if stop and not last:
                    raise Stopped(128 + stop)
    finally:
        log.close()


class Source:
    """Where a stage's rows come from, and its loss: the objective on its rows plus the anchor on the others."""

    def __init__(self, work: Workspace, name: str, stage: Stage, engine: Engine) -> None:
        run, self.stage, self.work, self.index = work.run, stage, work, stages.INDEX[name]
        self.seed, self.path = run.seed, work.path
        self.own, self.anchored = stages.rows(stage)
        self.total = stages.schedule(stage).total
        self.draws_data = ROWS[stage.objective.kind].draws == "data"
        self.loader = Loader(work.data, run.seed, work.device) if self.draws_data else None
        net = engine.frozen(work.network(stage.teacher)) if stage.teacher else None
        self.teacher = guided(net, stage.teacher_guidance) if net else None
        self.pool = None
        if stages.trajectory_rows(stage):
            assert stage.trajectories is not None
            teacher = guided(net, stage.trajectories.guidance)
            self.pool = stages.pool(run, name, teacher, work.data.shape, work.data.classes, work.device)
        wanted = any(
            getattr(o, "distance", "") == "features"
            for o in (stage.objective, getattr(stage.anchor, "objective", None))
        )
        self.features = getattr(work.space, "differentiable", None) if wanted else None

    def loss(self, engine: Engine, step: int, part: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to differentiate in pass `part` of a step, averaged over its rows, and the scalars to log."""
        random = rng.Random(self.seed, self.index, step)
        world = World(self.path, random, self.teacher, step / self.total, self.features)
        mine = slice(distributed.rank() + part * distributed.size(), None, distributed.size() * engine.passes)
        rows = torch.arange(self.own, device=self.work.device)[mine]
        drawn = self._data(random, step, rows) if self.draws_data else self._points(random, step, rows, rows)
        loss, scalars = ROWS[self.stage.objective.kind].function(engine, drawn, self.stage.objective, world)
        scalars = {k: v.mean() for k, v in scalars.items()}
        anchor = self.stage.anchor
        if anchor is None:
            return loss.mean(), scalars
        rows = torch.arange(self.anchored, device=self.work.device)[mine]
        points = self._points(random, step, rows, rows + self.own)
        held, _ = ROWS[anchor.objective.kind].function(engine, points, anchor.objective, world)
        scalars |= {"post_loss": loss.detach().mean(), "anchor_loss": held.detach().mean()}
        share = self.anchored / self.stage.batch
        return (1 - share) * anchor.post_weight * loss.mean() + share * held.mean(), scalars

    def _data(self, random: rng.Random, step: int, rows: Tensor) -> Batch:
        assert self.loader is not None
        x_0, labels = self.loader.rows(rows + step * self.own)
        return Batch(x_0, labels, rows, self._drop(random, labels, rows))

    def _points(self, random: rng.Random, step: int, rows: Tensor, sample: Tensor):
        assert self.pool is not None
        points = self.pool.draw(step, rows)
        return points._replace(drop=self._drop(random, points.labels, sample))

    def _drop(self, random: rng.Random, labels: Tensor | None, sample: Tensor) -> Tensor | None:
        """One mask a batch, for every copy of it."""
        return None if labels is None else random.uniform(rng.DROP, sample) < self.stage.label_dropout


def _parent(work: Workspace, stage: Stage, engine: Engine, fresh: bool) -> dict | None:
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


def _resumed(found: checkpoint.Checkpoint | None) -> dict[str, Tensor]:
    """The sums of a row of metrics that a stop cut in two: this rank's own, or the mean if ranks are other than then."""
    row = found.manifest.get("row") if found else None
    if not row:
        return {}
    ranks, mine = row["sums"], distributed.rank()
    sums = ranks[mine] if len(ranks) == distributed.size() else [sum(s) / len(ranks) for s in zip(*ranks)]
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in zip(row["keys"], sums)}


def _save(work: Workspace, name: str, engine: Engine, step: int, last: bool, lineage, wall, sums) -> None:
    """A checkpoint, written by rank 0; all ranks take part in gathering it. Raises OSError on all if the disk refuses."""
    stage = work.run.stage(name)
    ranks = distributed.every_rank([float(v) for v in sums.values()])
    if not all(
        _finite(v) for values in ranks for v in values
    ):  # a stop does not wait for the row that would have seen it
        raise FloatingPointError(f"{name}: the loss is not finite at step {step}; the last checkpoint is sound")
    about = {
        "stage": name,
        "nimg": step * stage.batch,
        "done": last,
        "recipe": work.run.name,
        "config": config.stage_digest(work.run, name),
        "parent": lineage,
        "wall": wall,
        "engine": {"kind": work.run.engine, "stage": work.sizing(name).stage, "processes": distributed.size()},
        "row": {"keys": list(sums), "sums": ranks} if sums else None,
    }
    refused: OSError | None = None
    try:
        checkpoint.save(work.folder / name, step, engine.state(), about, write=distributed.rank() == 0)
    except OSError as error:
        refused = error
    if distributed.largest(int(refused is not None)):
        raise refused or OSError("the process that writes could not write the checkpoint")


def _watch(
    work: Workspace, name: str, stage: Stage, engine: Engine, plan: stages.Schedule, n: int, last: bool, log: Log
) -> None:
    """What is looked at during training: figures, pictures, EMA snapshots. All ranks give the network, rank 0 looks."""
    due = lambda every: every and (n % every == 0 or last)
    first = distributed.rank() == 0
    if due(plan.eval_every) or due(plan.grid_every) or last:
        net = engine.average()
        if first and due(plan.eval_every):
            log.row(
                "eval", n, n * stage.batch, {"steps": work.evaluate(net, work.run.eval.steps, work.run.eval.n_during)}
            )
        if first and (due(plan.grid_every) or last):
            draw_grid(work, net, name, n)
    if due(plan.snapshot_every):
        for i, profile in enumerate(stage.ema):
            if isinstance(profile, PowerEma):
                tensors, about = (
                    engine.state()[f"ema-{i}"],
                    {"stage": name, "sigma_rel": profile.sigma_rel, "done": False},
                )
                folder = work.folder / name / "snapshots" / f"ema-{i}"
                checkpoint.save(folder, n, {"ema": tensors}, about, keep=1000, write=first)
    distributed.barrier()


def draw_grid(work: Workspace, net, name: str, step: int) -> None:
    """The same noise through 1, 2 and many steps: RUN/stage/grids/step.png."""
    run, n = work.run, 10 if len(work.data.shape) == 3 else 1500
    rows = [(f"{k} step{'s' * (k > 1)}", work.setting.generate(net, k, n, run.eval.seed)) for k in run.eval.steps]
    teacher = net if name == "pre" else work.network("pre")
    title = f"solver, {run.sampler.teacher_steps}" if name == "pre" else f"teacher, {run.sampler.teacher_steps}"
    rows.append((title, work.setting.generate(teacher, run.sampler.teacher_steps, n, run.eval.seed, solver=True)))
    pictures.grid(rows, work.folder / name / "grids" / f"{step:08d}.png")


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
    """Images, steps and network forwards of a stage (backward counted as two): what --dry-run prints."""
    stage = run.stage(name)
    assert stage is not None
    plan, (own, anchored) = stages.schedule(stage), stages.rows(stage)
    needs = ROWS[stage.objective.kind]
    forwards = own * needs.forwards + anchored * 3.0
    o = stage.objective
    if o.kind == "meanflow":
        forwards += own * o.ratio
    if o.kind == "ecd":
        forwards += own * (2 if o.step == "heun" else 1) * (1 if stage.teacher_guidance == 1 else 2)
    points = stages.trajectory_rows(stage)
    if points and stage.trajectories:
        t = stage.trajectories
        each = trajectories.drawn(t, run.path, t.nfe // (2 if t.solver == "heun" else 1))
        forwards += points * t.nfe / each * (1 if t.guidance == 1 else 2)
    return {"steps": plan.total, "images": plan.total * stage.batch, "forwards": plan.total * forwards}
