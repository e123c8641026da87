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

from cmt_fast import checkpoint, compiled, config, distributed, machine, stages, trajectories, watch
from cmt_fast import engine as engines
from cmt_fast.engine import Engine
from cmt_fast.log import Log, say
from cmt_fast.objectives import ROWS
from cmt_fast.schema import Run, Stage
from cmt_fast.source import Source
from cmt_fast.workspace import Workspace

LOOK_S = 5.0  # seconds between looks for a signal: torchrun gives its processes 30 to save and end


class Stopped(SystemExit):
    """The process was asked to stop; a checkpoint is on disk. Exit code 128 + signal."""


def train(work: Workspace, names: list[str]) -> None:
    """Train the named stages of a run in order; finished ones are passed over, unfinished ones go on."""
    with work.lock(), _signals() as asked:
        work.claim(names)
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
    others = work.others(stage)
    if found:
        _same(name, found.manifest, others)
    choice = work.sizing(name)
    if run.engine != "local" and distributed.rank() == 0:
        for line in choice.lines(work.parameters, distributed.size()):
            say(f"{name:>8} {line}")
    machine.allow_tf32(stage.precision == "tf32")
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
    source = None
    try:
        source = Source(work, name, stage, engine, found=found)
        if found is None and source.trajectories.get("errors"):
            log.row("trajectories", 1, stage.batch, source.trajectories)
        if stage.compile:
            compiled.guard(engine, lambda: source.loss(engine, engine.step_count), f"{name}.compile")
        if found and found.manifest.get("unseen"):
            watch.look(work, name, stage, engine, plan, engine.step_count, False, log)
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
                if last or not stop:  # one who stops does not wait for an evaluation: it is made up for on resuming
                    watch.look(work, name, stage, engine, plan, n, last, log)
                wall["eval_s"] += time.perf_counter() - clock
                clock = time.perf_counter()
            if n % plan.checkpoint_every == 0 or last or stop:
                log.commit()
                rolled = source.trajectories
                _save(work, name, engine, n, last, lineage, others, rolled, wall, sums, bool(row and stop and not last))
                clock = time.perf_counter()
                if stop and not last:
                    raise Stopped(128 + stop)
    finally:
        machine.allow_tf32(False)
        log.close()
        if source:
            source.close()


def _same(name: str, manifest: dict, others: dict) -> None:
    """Raises ConfigError when a stage that has begun would go on with other networks of other runs."""
    moved = config.changed(manifest.get("others", {}), others)
    if moved:
        raise config.ConfigError(f"{name}.{moved[0]}: has changed since this stage began; start it in a new folder")


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


def _save(
    work: Workspace, name: str, engine: Engine, step: int, last: bool, lineage, others, rolled, wall, sums, unseen: bool
) -> None:
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
        "config": config.stage_digest(work.run, name, others),
        "parent": lineage,
        "others": others,
        "wall": wall,
        "engine": {"kind": work.run.engine, "stage": work.sizing(name).stage, "processes": distributed.size()},
        "unseen": unseen,  # a row of metrics whose evaluation is still to be made
        "row": {"keys": list(sums), "sums": ranks} if sums else None,
    } | ({"trajectories": rolled} if rolled else {})
    first = distributed.rank() == 0
    distributed.agreed(lambda: checkpoint.save(work.folder / name, step, engine.state(), about, write=first))


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
    if points and stage.trajectories and not stage.trajectories.cache:
        t = stage.trajectories
        each = trajectories.drawn(t, run.path, t.nfe // (2 if t.solver == "heun" else 1))
        alone = t.guidance == 1 and not (stage.autoguidance and stage.autoguidance.trajectories)
        forwards += points * t.nfe / each * (1 if alone else 2)
    return {"steps": plan.total, "images": plan.total * stage.batch, "forwards": plan.total * forwards}
