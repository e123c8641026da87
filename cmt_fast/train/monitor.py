"""What is looked at while a stage trains: figures, pictures, EMA snapshots."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmt_fast.config.schema import PowerEma
from cmt_fast.engine import Engine
from cmt_fast.render import grids
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress, signals, words
from cmt_fast.storage import checkpoint
from cmt_fast.storage.metrics_log import Log
from cmt_fast.train import looking
from cmt_fast.train.saving import Saver


def due(stage: ResolvedStage, n: int, last: bool) -> bool:
    """Whether anything is to be looked at after step n."""
    plan = stage.schedule
    return last or any(every and n % every == 0 for every in (plan.eval_every, plan.grid_every, plan.snapshot_every))


def to_come(stage: ResolvedStage, n: int) -> int:
    """At how many steps after step n something is `due`: the stage's last, and those before it."""
    plan = stage.schedule
    every = [e for e in (plan.eval_every, plan.grid_every, plan.snapshot_every) if e]
    if n >= plan.total:
        return 0
    of = lambda together: (plan.total - 1) // math.lcm(*together) - n // math.lcm(*together)
    sets = ((-1) ** k * of(part) for k in range(len(every)) for part in itertools.combinations(every, k + 1))
    return 1 + sum(sets)  # steps at which two are due are counted once


def title(work: Workspace, stage: ResolvedStage, n: int, last: bool) -> str:
    """What `observe` will do after step n."""
    plan, e = stage.schedule, work.run.eval
    if plan.evaluates(n, last):
        return f"evaluating, {e.n_during:,} samples at {' and '.join(map(str, e.steps))} step{'s' * (max(e.steps) > 1)}"
    return "drawing samples"


def looks(stage: ResolvedStage, n: int, last: bool) -> bool:
    """Whether the network is judged or drawn after step n, before which a checkpoint is on disk."""
    return stage.schedule.evaluates(n, last) or stage.schedule.draws(n, last)


def keep(stage: ResolvedStage, n: int, last: bool, saver: Saver) -> None:
    """The snapshots of the EMA that are due after step n, before the checkpoint of the same step."""
    for i, profile in enumerate(stage.config.ema if stage.schedule.keeps(n, last) else ()):
        if isinstance(profile, PowerEma):
            about = {"stage": stage.name, "sigma_rel": profile.sigma_rel, "done": False}
            saver.save(stage.folder / "snapshots" / f"ema-{i}", n, about, {f"ema-{i}": "ema"}, keep=1000)


def observe(
    work: Workspace,
    stage: ResolvedStage,
    engine: Engine,
    n: int,
    last: bool,
    log: Log,
    held: Mapping[str, Any] | None = None,
    judged_s: float = 0.0,
) -> None:
    """The evaluation and the grid that are due after step n. All ranks give the network and judge it together; rank 0 draws.

    Each fails for itself, as `looking.attempt` says. held: frozen networks that the stage has in memory, by name; judged_s:
    seconds of looks before this one.
    """
    begun, plan, nets = time.monotonic(), stage.schedule, list[nn.Module]()
    attempt = lambda what, call: looking.attempt(what, call, stage, n, log)
    if not attempt("reading the EMA", lambda: nets.append(engine.average())):
        return
    if plan.evaluates(n, last):
        took = lambda: {"eval_s": judged_s + time.monotonic() - begun}  # the checkpoint before it cannot say
        attempt("the evaluation", lambda: _evaluate(work, stage, nets[0], n, log, took))
    if plan.draws(n, last):
        file = stage.folder / "grids" / f"{n:08d}.png"
        if attempt("the grid", lambda: _grid(work, stage, nets[0], file, held or {})):
            log.picture("samples", plan.nimg(n), file)
    distributed.barrier()


def _evaluate(work: Workspace, stage: ResolvedStage, net: Callable, n: int, log: Log, took: Callable) -> None:
    n_during, nimg = work.run.eval.n_during, stage.schedule.nimg(n)
    distributed.agreed(lambda: work.judging.judge, Exception, looking.ELSEWHERE)
    work.judging.keep()  # so that the run can be judged where its data are not
    figures = work.judging.evaluate(net, work.run.eval.steps, n_during, quiet=True)
    log.row("eval", n, nimg, {"steps": figures, **work.judging.about(n_during)}, took())
    distance = ", ".join(f"{row['frechet']:.4g} @{k}" for k, row in figures.items())
    progress.told(stage.name, f"after {nimg:,} images", f"{work.judging.judge.title(n_during)}: {distance}")


def _grid(work: Workspace, stage: ResolvedStage, net: Callable, file: Path, held: Mapping[str, Any]) -> None:
    """Rank 0 draws, and reads what it draws from, alone: where that fails all ranks raise. Sharded networks are called by all."""
    together = any(not isinstance(other, nn.Module) for other in held.values())
    solved = _solved(work, net, stage, held) if together else None

    def draw() -> None:
        if distributed.rank() == 0:
            with contextlib.suppress(signals.Stopped):  # which all are by the look after it
                draw_grid(work, net, stage, file, solved if together else _solved(work, net, stage, held))

    distributed.agreed(draw, Exception, looking.ELSEWHERE)
    signals.look()


def draw_grid(
    work: Workspace, net: Callable, stage: ResolvedStage, file: Path, solved: tuple[str, Tensor] | None = None
) -> None:
    """The same noise through 1, 2 and many steps, one picture of each class in order, in a PNG file; solved: as `_solved`.
    Raises Stopped where this rank was asked to stop before a row."""
    run, setting, rows = work.run, work.setting.each_class(), []
    for k in run.eval.steps:
        if signals.wanted():
            raise signals.Stopped(0)
        rows.append((words.steps(k), setting.generate(net, k, _pictures(work), run.eval.seed)))
    seen = [(title, *work.decoding.visible(x)) for title, x in (*rows, *([solved] if solved else []))]
    grids.grid([(f"{title}\n{note}", x) for title, x, note in seen], file)


def _solved(work: Workspace, net: Callable, stage: ResolvedStage, held: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """The last row of a grid: what the solver makes of the teacher, or of the network itself in pre-training.

    A teacher's row is the same in every grid, so it is made once in a process: by the network that the stage has in memory,
    all ranks together where it is sharded; else read for this row by rank 0. None where there is none, and on the others.
    """
    name, config = stage.name, stage.config
    before = "pre" if checkpoint.steps(work.stage_dir("pre")) else None
    named = (config.teacher or before) if name != "pre" and not stage.cache else None  # no teacher for a cache
    sharded = named in held and not isinstance(held[named], nn.Module)
    if (distributed.rank() and not sharded) or not (named or name == "pre"):
        return None
    calls, setting = work.run.sampler.teacher_steps, work.setting.each_class()
    draw = lambda net: setting.generate(net, calls, _pictures(work), work.run.eval.seed, solver=True)
    if not named:
        return f"solver, {calls}", draw(net)
    key = f"teacher, {calls}", str(work.stage_dir(named)), work.run.eval.seed
    if key not in work.drawn_rows:
        work.drawn_rows[key] = draw(held[named] if named in held else work.network(named))
    return key[0], work.drawn_rows[key]


def _pictures(work: Workspace) -> int:
    """In a row of a grid; points where rows are vectors."""
    return 10 if len(work.data.shape) == 3 else 1500
