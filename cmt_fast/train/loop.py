"""The training loop: one function for every stage.

A stage starts from the EMA of the stage before, draws rows of data or points of the teacher's
trajectories, and takes optimizer steps; every step's numbers are a function of (seed, stage, step), so a
killed run that is started again ends with the same weights, EMA and metrics as one that was not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cmt_kernels
import torch
from cmt_kernels.attention import small
from torch import Tensor

from cmt_fast.config import fingerprint, loading
from cmt_fast.config.schema import Run
from cmt_fast.engine import Engine, ShardingPlan, compile
from cmt_fast.engine.graph import StepGraph
from cmt_fast.objectives.rounding import KINDS
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, machine, progress
from cmt_fast.runtime.progress import say
from cmt_fast.runtime.signals import Stopped, noted
from cmt_fast.storage import checkpoint
from cmt_fast.storage.loggers import Opening
from cmt_fast.storage.metrics_log import Log
from cmt_fast.train import attention_choice, batches, looking, monitor, rounding_choice, solver_choice, starting
from cmt_fast.train.half_way import HalfWay, check_loggers
from cmt_fast.train.profiler import Profile
from cmt_fast.train.saving import REFUSED, Saver
from cmt_fast.usage import ledger, meters

LOOK_S = 5.0  # seconds between looks for a signal: torchrun gives its processes 30 to save and end


def train(
    work: Workspace, names: list[str], profile: Profile | None = None, draw: Callable[[], object] | None = None
) -> None:
    """Train the named stages of a run in order; finished ones are passed over, unfinished ones go on.

    profile: profiles some steps of the first stage that is trained; draw: writes the run's page, after evaluations.
    """
    work.check_guidance()
    check_loggers(work.run)
    page = HalfWay(draw if distributed.rank() == 0 else None)
    meter = meters.Meter.of(work.device)
    with work.lock(), noted() as asked:
        work.claim(names)
        left = list(names)
        while left:
            try:
                train_stage(work, work.stage(left[0]), asked, meter, profile, page)
                left.pop(0)
            except checkpoint.Damaged as error:  # on all ranks: the one before it is used
                starting.set_aside(work, error)
                left = list(names)


def train_stage(
    work: Workspace,
    stage: ResolvedStage,
    asked: list[int],
    meter: meters.Meter | None = None,
    profile: Profile | None = None,
    page: HalfWay | None = None,
) -> None:
    """One stage, from its start or its last checkpoint to its end. Raises FloatingPointError when the loss is not finite.

    asked: signals that ask the process to stop; meter: what this process has spent and no stage was billed for yet; page:
    is drawn after evaluations. Long: it is the list of what is opened for a stage, in order.
    """
    run, name, folder, config = work.run, stage.name, stage.folder, stage.config
    grad_accum_steps = stage.grad_accum_steps(distributed.size())
    found = starting.newest(folder)
    stage = starting.going_on(work, stage, found)
    plan = stage.schedule
    unseen = bool(found and looking.owed(stage, found.manifest))
    if found and found.manifest.get("done") and not unseen:
        return say(f"{name:>8} done ({found.manifest['nimg']} images)") if distributed.rank() == 0 else None
    others = work.external_inputs(stage) | solver_choice.settle(work, stage)
    if found:
        fingerprint.check_inputs(name, found.manifest.get("others", {}), others)
    choice = work.sharding_plan(stage)
    first, meter = distributed.rank() == 0, meter or meters.Meter.of(work.device)
    if run.engine != "local" and first:
        for line in choice.lines(work.parameters, distributed.size()):
            say(f"{name:>8} {line}")
    folder.mkdir(parents=True, exist_ok=True)
    if first:
        checkpoint.clear(folder)
    with contextlib.ExitStack() as ending:
        account = ledger.Account(folder, meter, found.manifest if found else None, first)
        ending.callback(account.close)
        shown = ending.enter_context(_shown(work, stage, found.manifest["step"] if found else 0, meter.unit))
        machine.allow_tf32(config.precision == "tf32")
        ending.callback(machine.allow_tf32, False)
        engine = work.engine_of(stage, grad_accum_steps, choice, found is not None)
        ending.callback(engine.close)
        lineage = starting.parent(work, config, engine, found is None)
        wall = {"train_s": 0.0, "eval_s": 0.0, "save_s": 0.0}  # of the steps that count; the bill has the lost ones too
        if found:
            starting.load(engine, found, stage)
            wall |= found.manifest["wall"]
        log = _log(run, stage, engine.step_count, lineage, first, unseen)
        ending.callback(log.close)
        ending.enter_context(small.using(attention := attention_choice.settle(work, config, found)))
        source = batches.provider(work, stage, engine, meter, found)
        ending.callback(source.close)
        if found is None and source.trajectories.get("errors"):
            log.row("trajectories", 1, config.batch, source.trajectories)
        source.rounding = rounding_choice.settle(stage, engine, source, starting.measured(stage, found))
        rounding = source.rounding.stored() if source.rounding else None
        chosen = {"trajectories": source.trajectories, "attention": attention, "rounding": rounding}
        always = _identity(stage, lineage, others, choice, chosen)
        if config.compile:
            ending.enter_context(compile.more_kinds(KINDS if rounding else 0))
            compile.guard(engine, lambda: source.loss(engine, engine.step_count), f"{name}.compile")
        gradient = _gradient(engine, source, name, profile)
        meter.lap("startup")
        sums, page = Sums(found), page or HalfWay(None)
        saver = Saver(engine, name, run.saves == "waiting")
        ending.callback(saver.close)
        clock = looking.Clock(config.checkpoint_every_s)
        taken = Steps(
            work, stage, engine, source, gradient, log, shown, account, meter, sums, wall, always, page, saver, clock
        )
        if unseen:
            taken.observe(engine.step_count, last=engine.step_count == plan.total)
        steps = range(engine.step_count, plan.total)
        if profile and not profile.done and first:
            every = source.pool.steps if source.pool else 1
            kept = profile.over(steps, plan, every, work.device, config.products, config.compile, folder)
            steps = ending.enter_context(contextlib.closing(kept))
        taken.take(steps, asked)
        account.settle(plan.total, end=True)


def _shown(work: Workspace, stage: ResolvedStage, step: int, unit: str) -> progress.Stage:
    """What a person sees of a stage that has done `step` steps."""
    plan, left = stage.schedule, functools.partial(monitor.to_come, stage)
    return progress.Stage(stage.name, step, plan.total, plan.batch, work.folder, pauses=left, unit=unit, nimg=plan.nimg)


class Steps(NamedTuple):
    """The steps of a stage: what they are taken with, and where their metrics and checkpoints go.

    gradient: adds the gradient of a part of a step to the engine's; wall: seconds of the steps that count, save_s those in
    which none ran for a save; always: what every checkpoint of the stage says alike; page: of the run, drawn half-way.
    """

    work: Workspace
    stage: ResolvedStage
    engine: Engine
    source: batches.BatchProvider
    gradient: StepGraph
    log: Log
    shown: progress.Stage
    account: ledger.Account
    meter: meters.Meter
    sums: Sums
    wall: dict[str, float]
    always: dict[str, Any]
    page: HalfWay
    saver: Saver
    clock: looking.Clock

    def take(self, steps: Iterable[int], asked: list[int]) -> None:
        """Take them, each with the row of metrics, the checkpoint and then the look that are due after it.

        Raises FloatingPointError when the loss is not finite, and Stopped where a signal asked for it, after a checkpoint.
        """
        plan, wall, look_every = self.stage.schedule, self.wall, 1
        for step in steps:
            lr = self._one(step)
            n, last = step + 1, step + 1 == plan.total
            row = n % plan.log_every == 0 or last
            # a look costs a collective call and waits for the device: every row, and every LOOK_S between
            stop, overdue = self._asked(asked) if row or n % look_every == 0 else (0, False)
            if row or stop or overdue:
                wall["train_s"] += self.meter.lap("train")
            look = row and monitor.looks(self.stage, n, last)
            if row:
                self._row(n, lr)
                look_every = distributed.smallest(max(1, int(LOOK_S * n / wall["train_s"])))
                monitor.keep(self.stage, n, last, self.saver)
            # before a look, which can cost no step then; one who stops leaves it to who goes on
            if n % plan.checkpoint_every == 0 or last or stop or overdue or look:
                self._checkpoint(n, last, unseen=look, end=last or bool(stop))
            if look and (last or not stop):
                self.observe(n, last)
            self.shown.step(n, lambda n=n: self.sums.loss(self._since(n)))
            if stop and not last:
                raise Stopped(128 + stop)

    def _asked(self, asked: list[int]) -> tuple[int, bool]:
        """The signal that asks any rank to stop, 0 for none, and whether a checkpoint is due by time: one collective call."""
        code = distributed.largest(2 * self.saver.asks(asked[0] if asked else 0) + self.clock.overdue())
        stop, overdue = code // 2, bool(code % 2)
        if stop >= REFUSED:
            self.saver.finish()
        return stop, overdue

    def observe(self, n: int, last: bool) -> None:
        """The look that is due after n steps, with the memory of the step's graph."""
        self.gradient.release()
        with self.shown.pause(monitor.title(self.work, self.stage, n, last)):
            monitor.observe(
                self.work, self.stage, self.engine, n, last, self.log, self.source.held, self.wall["eval_s"]
            )
            looking.attempt("the page", self.page.draw, self.stage, n, self.log)
        self.wall["eval_s"] += self.meter.lap("evaluation")
        self.log.commit()
        self.account.settle(n, end=False)  # of the checkpoint before it, which does not know what it cost

    def _since(self, n: int) -> int:
        """Steps of the row of metrics that step n is in."""
        every = self.stage.schedule.log_every
        return n - (n - 1) // every * every

    def _one(self, step: int) -> float:
        """Gradients of every part of a step, and the optimizer's step. Returns its learning rate."""
        parts = self.engine.grad_accum_steps
        for part in range(parts):
            self.sums.add(self.gradient(self._drawn(step, part)), parts)
        lr = self.stage.schedule.lr(self.stage.config, step)
        self.sums.add({"grad_norm": self.engine.step(lr)})
        return lr

    def _drawn(self, step: int, part: int) -> Any:
        """What the source draws; where its memory ends, as of a round of rollouts, once more without the step's graph.

        Not on several ranks: a round and the proof of a graph are made by all together, and the others have memory.
        """
        try:
            return self.source.draw(step, part)
        except torch.OutOfMemoryError:
            if distributed.size() > 1:
                raise
            self.gradient.release()
        return self.source.draw(step, part)

    def _row(self, n: int, lr: float) -> None:
        """A row of metrics after n steps: means since the row before."""
        nimg = self.stage.schedule.nimg(n)
        means = self.sums.means(self._since(n))
        if not all(map(_finite, means.values())):
            raise FloatingPointError(
                f"{self.stage.name}: loss {means['loss']} at step {n}; the last checkpoint is sound"
            )
        speed = nimg / self.wall["train_s"]
        self.saver.told()
        written = {"written_s": self.saver.write_s} if self.saver.write_s else {}  # beside the steps, by this process
        spent = {**self.wall, **written, "images_per_s": speed, "bill": self.account.add()}
        self.log.row("train", n, nimg, {**means, "lr": lr, **self.engine.scaling()}, spent)
        self.shown.saw(means["loss"])
        self.shown.spent(self.account.bill.total(self.meter.unit).hours, self.account.held)

    def _checkpoint(self, n: int, last: bool, unseen: bool, end: bool) -> None:
        """A checkpoint after n steps. unseen: a look is due after it, for which it is waited for; end: no step comes after it."""
        self.log.commit()
        nimg = self.stage.schedule.nimg(n)
        now = {"nimg": nimg, "done": last, "unseen": unseen, "wall": dict(self.wall), "bill": self.account.add()}
        now["proofs"] = dict(cmt_kernels.proofs())
        with progress.phase("writing a checkpoint"):
            _save(self.stage.folder, n, self.saver, self.always | now, self.sums)
            if end or unseen:
                self.saver.finish()
        self.wall["save_s"] += self.meter.lap("checkpoint")
        self.clock.saved()
        if end or unseen:
            return self.account.settle(n, end=end and not last)
        bill = self.account.add()
        self.saver.when_written(lambda: self.account.stands(n, bill))


def _log(run: Run, stage: ResolvedStage, step: int, lineage: dict | None, write: bool, unseen: bool) -> Log:
    """The stage's record after `step`, and its loggers on an axis that begins with the images of the stages before it."""
    before, parent = 0, lineage
    while parent and "nimg" in parent:  # an imported file has none
        before, parent = before + parent["nimg"], parent.get("parent")
    plan = stage.schedule
    about = Opening(run.name, stage.folder, plan.nimg(plan.total), before, plan.nimg(step), settings=loading.dump(run))
    return Log(stage.folder, step, write, run.logging, about, unseen)


def _gradient(engine: Engine, source: batches.BatchProvider, name: str, profile: Profile | None) -> StepGraph:
    """What adds the gradient of a part of a step; kernel by kernel up to the last step that is profiled."""
    tell = say if distributed.rank() == 0 else lambda line: None
    return StepGraph(engine, lambda drawn: source.loss_of(engine, drawn), name, tell, _waiting(profile))


def _waiting(profile: Profile | None) -> Callable[[], bool]:
    """Whether rank 0 still profiles, the same on all ranks: a graph is recorded and proven by all at one pass."""
    asked = profile is not None

    def waiting() -> bool:
        nonlocal asked
        asked = asked and bool(distributed.largest(int(profile.running)))
        return asked

    return waiting


def _identity(
    stage: ResolvedStage, lineage: dict | None, others: dict, choice: ShardingPlan, chosen: dict[str, Any]
) -> dict[str, Any]:
    """What a stage is, what it comes from and how it is trained: what all its checkpoints say alike.

    chosen: by measurement when it began; what is empty is left out.
    """
    run, name, chosen = stage.run, stage.name, {**chosen, "changes": list(stage.changes)}
    return {
        "stage": name,
        "recipe": run.name,
        "config": fingerprint.stage_digest(run, name, others, stage.changes),
        "parent": lineage,
        "others": others,
        "engine": {"kind": run.engine, "stage": choice.stage, "processes": distributed.size()},
        **{key: found for key, found in chosen.items() if found},
    }


class Sums:
    """Scalars of the steps since the last row of metrics; they stay on their device until a row or a checkpoint is due."""

    def __init__(self, found: checkpoint.Checkpoint | None) -> None:
        """found: its row may have been cut in two; this rank goes on with its own part, or the mean if ranks are others."""
        row, self.sums = found.manifest.get("row") if found else None, dict[str, Tensor]()
        if row:
            ranks = row["sums"]
            same = len(ranks) == distributed.size()
            mine = ranks[distributed.rank()] if same else [sum(s) / len(ranks) for s in zip(*ranks)]
            self.sums = {k: torch.tensor(v, dtype=torch.float64) for k, v in zip(row["keys"], mine)}

    def add(self, scalars: dict[str, Tensor], grad_accum_steps: int = 1) -> None:
        """Scalars of one part of a step."""
        for key, value in scalars.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.double() / grad_accum_steps

    def means(self, steps: int) -> dict[str, float]:
        """Over the steps of a row and all ranks; the next row begins."""
        found = {k: float(distributed.mean_(v.clone()) / steps) for k, v in self.sums.items()}
        self.sums = {}
        return found

    def loss(self, steps: int) -> float | None:
        """This rank's mean over the steps since the last row, None where there was none; waits for the device."""
        return float(self.sums["loss"]) / steps if "loss" in self.sums else None

    def state(self) -> dict | None:
        """What a checkpoint in the middle of a row keeps: every rank's sums."""
        ranks = distributed.every_rank([float(v) for v in self.sums.values()])
        return {"keys": list(self.sums), "sums": ranks} if self.sums else None


def _save(folder: Path, step: int, saver: Saver, about: dict, sums: Sums) -> None:
    """A checkpoint, written by rank 0; all ranks take part in gathering it. Raises OSError on all if the disk has refused.

    A stop does not wait for the row that would have seen that the loss is not finite: that is seen here.
    """
    row = sums.state()
    if row and not all(_finite(v) for values in row["sums"] for v in values):
        raise FloatingPointError(
            f"{about['stage']}: the loss is not finite at step {step}; the last checkpoint is sound"
        )
    saver.save(folder, step, {**about, "row": row})


def _finite(x: float) -> bool:
    return abs(x) < float("inf")
