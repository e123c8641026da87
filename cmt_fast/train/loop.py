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
from typing import Any, NamedTuple, NoReturn

import cmt_kernels
import torch
from cmt_kernels.attention import small
from torch import Tensor

from cmt_fast.config import fingerprint, loading
from cmt_fast.engine import Engine, ShardingPlan, compile
from cmt_fast.engine.graph import StepGraph
from cmt_fast.objectives.rounding import KINDS
from cmt_fast.run import recorded
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, leftovers, machine, memory, progress
from cmt_fast.runtime.progress import say
from cmt_fast.runtime.signals import Stopped, noted
from cmt_fast.storage import checkpoint, leftovers, metrics_log
from cmt_fast.storage.loggers import Opening
from cmt_fast.storage.metrics_log import Log
from cmt_fast.train import (
    attention_choice,
    batches,
    looking,
    monitor,
    nonfinite,
    rounding_choice,
    solver_choice,
    starting,
)
from cmt_fast.train.half_way import HalfWay, check_loggers
from cmt_fast.train.profiler import Profile
from cmt_fast.train.saving import REFUSED, Saver
from cmt_fast.usage import ledger, meters

LOOK_S = 2.0  # seconds between looks for a signal: torchrun gives its processes 30 to save and end


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
        if distributed.rank() == 0:
            leftovers.clear(work.folder)
        distributed.at_work(work.folder)
        left = list(names)
        while left:
            try:
                with memory.named(left[0]), leftovers.told(left[0]):
                    train_stage(work, work.stage(left[0]), asked, meter, profile, page)
                left.pop(0)
            except checkpoint.Damaged as error:  # on all ranks: the one before it is used
                starting.set_aside(work, error)
                left = list(names)
            except nonfinite.RollBack as asked_back:  # on all ranks
                nonfinite.roll_back(work, asked_back)


def train_stage(
    work: Workspace,
    stage: ResolvedStage,
    asked: list[int],
    meter: meters.Meter | None = None,
    profile: Profile | None = None,
    page: HalfWay | None = None,
) -> None:
    """One stage, from its start or its last checkpoint to its end. Raises NotFinite or RollBack where a step is not finite.

    asked: signals that ask the process to stop; meter: what this process has spent and no stage was billed for yet; page:
    is drawn after evaluations. Long: it is the list of what is opened for a stage, in order.
    """
    run, name, folder, config = work.run, stage.name, stage.folder, stage.config
    grad_accum_steps = stage.grad_accum_steps(distributed.size())
    found = starting.newest(folder, recorded.contents(work.folder, name))
    stage = starting.going_on(work, stage, found)
    plan = stage.schedule
    unseen = bool(found and looking.owed(stage, found.manifest))
    if found and found.manifest.get("done") and not unseen:
        if distributed.rank() == 0:
            metrics_log.settle(folder, found.manifest)
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
        ending.enter_context(machine.tf32(config.precision == "tf32"))
        engine = work.engine_of(stage, grad_accum_steps, choice, found is not None)
        ending.callback(engine.close)
        lineage = starting.parent(work, config, engine, found is None)
        wall = {"train_s": 0.0, "eval_s": 0.0, "save_s": 0.0}  # of the steps that count; the bill has the lost ones too
        if found:
            starting.load(engine, found, stage)
            wall |= found.manifest["wall"]
        log = _log(stage, engine.step_count, lineage, first, found.manifest if found else {}, unseen)
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
        saver = Saver(engine, name, run.saves == "waiting", asked)
        guard = nonfinite.Guard(stage, engine, source, found)
        ending.callback(saver.close)
        clock = looking.Clock(config.checkpoint_every_s)
        taken = Steps(
            work,
            stage,
            engine,
            source,
            gradient,
            log,
            shown,
            account,
            meter,
            sums,
            wall,
            always,
            page,
            saver,
            clock,
            guard,
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
    guard: nonfinite.Guard

    def take(self, steps: Iterable[int], asked: list[int]) -> None:
        """Take them, each with the row of metrics, the checkpoint and then the look that are due after it.

        Raises NotFinite or RollBack where a step is not finite, and Stopped where a signal asked for it, after a checkpoint.
        """
        plan, wall, look_every = self.stage.schedule, self.wall, 1
        for step in steps:
            n, last = step + 1, step + 1 == plan.total
            # asking costs a collective call and waits for the device: every row, and every LOOK_S between
            row = n % plan.log_every == 0 or last
            asks = row or n % look_every == 0
            try:
                lr = self.guard.take(step, self._one, row, asks or n % plan.checkpoint_every == 0)
            except Stopped as within:  # a round of rollouts, before anything of this step counted
                self._leave(within)
            stop, overdue = self._asked(asked) if asks else (0, False)
            distributed.beat(n)
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
            self.shown.step(n, lambda n=n: self.sums.loss(self._since(n) - self.guard.missing))
            if stop and not last:
                raise Stopped(128 + stop)

    def _asked(self, asked: list[int]) -> tuple[int, bool]:
        """The signal that asks any rank to stop, 0 for none, and whether a checkpoint is due by time: one collective call."""
        code = distributed.largest(2 * self.saver.asks(asked[0] if asked else 0) + self.clock.overdue())
        stop, overdue = code // 2, bool(code % 2)
        if stop >= REFUSED:
            self.saver.finish()
        return stop, overdue

    def _leave(self, stopped: Stopped) -> NoReturn:
        """A stop within a round of rollouts: the checkpoint of the steps that are done, unless it is there. Raises Stopped.

        Nothing is saved where a step since the last checkpoint was not finite and is not decided on: it is taken again.
        """
        n = self.engine.step_count
        self.saver.finish()
        there = distributed.rank() == 0 and checkpoint.steps(self.stage.folder)[-1:] == [n]
        if n and not self.guard.undecided and not distributed.largest(int(there)):
            self.wall["train_s"] += self.meter.lap("train")
            self._checkpoint(n, False, unseen=False, end=True)
        raise (Stopped(stopped.code) if n else stopped) from None

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

    def _since(self, n: int) -> int:
        """Steps of the row of metrics that step n is in."""
        every = self.stage.schedule.log_every
        return n - (n - 1) // every * every

    def _one(self, step: int) -> float:
        """Gradients of every part of a step, and the optimizer's step. Returns its learning rate."""
        parts, before, losses = self.engine.grad_accum_steps, self.sums.kept(), []
        for part in range(parts):
            try:
                drawn = self._drawn(step, part)
            except Stopped:
                self.sums.sums = before
                raise
            self.sums.add(given := self.gradient(drawn), parts)
            losses.append(given["loss"].clone())
        lr = self.stage.schedule.lr(self.stage.config, step)
        self.sums.add({"grad_norm": (norm := self.engine.step(lr))})
        self.sums.only_where(self.guard.saw(step, losses, norm), before)
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
        means = self.sums.means(self._since(n) - self.guard.row)
        if not means:  # every step since the last row was skipped
            return
        speed = nimg / self.wall["train_s"]
        self.saver.told()
        written = {"written_s": self.saver.write_s} if self.saver.write_s else {}  # beside the steps, by this process
        spent = {**self.wall, **written, "images_per_s": speed, "bill": self.account.add()}
        self.log.row("train", n, nimg, {**means, "lr": lr, **self.engine.scaling(), **self.guard.told()}, spent)
        self.shown.saw(means["loss"])
        self.shown.spent(self.account.bill.total(self.meter.unit).hours, self.account.held)

    def _checkpoint(self, n: int, last: bool, unseen: bool, end: bool) -> None:
        """A checkpoint after n steps. unseen: a look is due after it, for which it is waited for; end: no step comes after it."""
        unwritten = self.log.commit()
        nimg = self.stage.schedule.nimg(n)
        now = {"nimg": nimg, "done": last, "unseen": unseen, "wall": dict(self.wall), "bill": self.account.add()}
        now |= {"proofs": dict(cmt_kernels.proofs()), **self.guard.stored()}
        now |= {"unwritten": unwritten} if unwritten else {}
        with progress.phase("writing a checkpoint"):
            _save(self.stage.folder, n, self.saver, self.always | now, self.sums, self.guard.missing)
            if end or unseen:
                self.saver.finish()
        self.wall["save_s"] += self.meter.lap("checkpoint")
        self.clock.saved()
        if end or unseen:
            return self.account.settle(n, end=end and not last)
        bill = self.account.add()
        self.saver.when_written(lambda: self.account.stands(n, bill))


def _log(stage: ResolvedStage, step: int, lineage: dict | None, write: bool, manifest: dict, unseen: bool) -> Log:
    """The stage's record after `step`, of whose checkpoint the manifest is. Loggers are on an axis that begins with the images of
    the stages before it."""
    before, parent, run = 0, lineage, stage.run
    while parent and "nimg" in parent:  # an imported file has none
        before, parent = before + parent["nimg"], parent.get("parent")
    plan = stage.schedule
    about = Opening(run.name, stage.folder, plan.nimg(plan.total), before, plan.nimg(step), settings=loading.dump(run))
    return Log(stage.folder, step, write, run.logging, about, unseen, manifest.get("unwritten", ()))


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
        "content": fingerprint.content_digest(run, name),
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

    def kept(self) -> dict[str, Tensor]:
        """What is summed so far, for `only_where`."""
        return dict(self.sums)

    def only_where(self, sound: Tensor, before: dict[str, Tensor]) -> None:
        """Leave out what came since `before` was kept, unless it is sound, (); nobody waits for the device to know."""
        for key, value in self.sums.items():
            self.sums[key] = torch.where(sound, value, before.get(key, torch.zeros_like(value)))

    def means(self, steps: int) -> dict[str, float]:
        """Over the steps of a row and all ranks; the next row begins."""
        found = {k: float(distributed.mean_(v.clone()) / steps) for k, v in self.sums.items()} if steps else {}
        self.sums = {}
        return found

    def loss(self, steps: int) -> float | None:
        """This rank's mean over the steps since the last row, None where there was none; waits for the device."""
        return float(self.sums["loss"]) / steps if "loss" in self.sums and steps else None

    def state(self) -> dict | None:
        """What a checkpoint in the middle of a row keeps: every rank's sums."""
        ranks = distributed.every_rank([float(v) for v in self.sums.values()])
        return {"keys": list(self.sums), "sums": ranks} if self.sums else None


def _save(folder: Path, step: int, saver: Saver, about: dict, sums: Sums, missing: int) -> None:
    """A checkpoint, written by rank 0; all ranks take part in gathering it. Raises OSError on all if the disk has refused.

    missing: steps of the row that it cuts in two that were skipped.
    """
    row = sums.state()
    if missing:
        row = {**(row or {"keys": [], "sums": [[] for _ in range(distributed.size())]}), "missing": missing}
    saver.save(folder, step, {**about, "row": row})
