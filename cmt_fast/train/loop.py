"""The training loop: one function for every stage.

A stage starts from the EMA of the stage before, draws rows of data or points of the teacher's
trajectories, and takes optimizer steps; every step's numbers are a function of (seed, stage, step), so a
killed run that is started again ends with the same weights, EMA and metrics as one that was not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from cmt_kernels.attention import small

from cmt_fast.config import fingerprint, loading
from cmt_fast.engine import Engine, ShardingPlan, compile
from cmt_fast.engine.graph import StepGraph
from cmt_fast.objectives.rounding import KINDS
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, leftovers, machine, memory, progress
from cmt_fast.runtime.progress import say
from cmt_fast.runtime.signals import noted
from cmt_fast.storage import checkpoint, debris, metrics_log
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
from cmt_fast.train.saving import Saver
from cmt_fast.train.steps import Steps, Sums
from cmt_fast.usage import ledger, meters


def train(
    work: Workspace,
    names: list[str],
    profile: Profile | None = None,
    draw: Callable[[], object] | None = None,
    meter: meters.Meter | None = None,
    page: HalfWay | None = None,
) -> None:
    """Train the named stages of a run in order; finished ones are passed over, unfinished ones go on.

    profile: profiles some steps of the first stage that is trained; draw: writes the run's page, after evaluations;
    meter: counts what it takes (default: one of this process); page: is told of evaluations in the place of `draw`.
    """
    work.check_guidance()
    check_loggers(work.run)
    page = page or HalfWay(draw if distributed.rank() == 0 else None)
    meter = meter or meters.Meter.of(work.device)
    with work.lock(), noted() as asked:
        work.claim(names)
        if distributed.rank() == 0:
            debris.clear(work.folder)
        distributed.at_work(work.folder)
        left = list(names)
        while left:
            starting.all_see(work.folder)
            try:
                with memory.named(left[0]), leftovers.told(left[0]):
                    train_stage(work, work.stage(left[0]), asked, meter, profile, page)
                left.pop(0)
            except checkpoint.Damaged as error:  # on all ranks: the one before it is used
                starting.set_aside(work, error)
                left = list(names)
            except nonfinite.RollBack as asked_back:  # on all ranks
                nonfinite.roll_back(work, asked_back)
        starting.all_see(work.folder)  # what is judged next


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
    found = starting.newest(folder, work.contents.get(name))
    stage = starting.going_on(work, stage, found)
    unseen = bool(found and looking.owed(stage, found.manifest))
    if found and found.manifest.get("done") and not unseen:
        if distributed.rank() == 0:
            metrics_log.settle(folder, found.manifest)
        return say(f"{name:>8} done ({found.manifest['nimg']} images)") if distributed.rank() == 0 else None
    others = work.external_inputs(stage) | solver_choice.settle(work, stage)
    stage = solver_choice.as_long(stage)
    plan = stage.schedule
    if found:
        fingerprint.check_inputs(name, found.manifest.get("others", {}), others)
    choice = work.sharding_plan(stage)
    first, meter = distributed.rank() == 0, meter or meters.Meter.of(work.device)
    if run.engine != "local" and first:
        for line in choice.lines(work.parameters, distributed.size()):
            say(f"{name:>8} {line}")
    folder.mkdir(parents=True, exist_ok=True)
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
            compile.guard(engine, lambda: source.every_form(engine, engine.step_count), f"{name}.compile")
        gradient = _gradient(engine, source, name, profile)
        meter.lap("startup")
        sums, page = Sums(found), page or HalfWay(None)
        saver = Saver(engine, name, run.saves == "waiting", asked)
        ending.callback(saver.close)
        guard = nonfinite.Guard(stage, engine, source, found, lambda: (gradient.release(), saver.finish()))
        clock = looking.Clock(config.checkpoint_every_s)
        taken = Steps(
            work, stage, engine, source, gradient, log, shown, account, meter, sums, wall, always, page, saver, clock, guard
        )  # fmt: skip
        if unseen:
            with looking.made_up(stage, engine.step_count):
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


def _log(stage: ResolvedStage, step: int, lineage: dict | None, write: bool, manifest: dict, unseen: bool) -> Log:
    """The stage's record after `step`, of whose checkpoint the manifest is. Loggers are on an axis that begins with the images of
    the stages before it."""
    before, parent, run = 0, lineage, stage.run
    while parent and "nimg" in parent:  # an imported file has none
        before, parent = before + parent["nimg"], parent.get("parent")
    plan = stage.schedule
    about = Opening(run.name, stage.folder, plan.nimg(plan.total), before, plan.nimg(step), settings=loading.dump(run))
    return Log(stage.folder, step, write, run.logging, about, unseen, manifest)


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
