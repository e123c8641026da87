"""A stage is a row of data: this page says which rows make sense, and how long each is in steps."""

from __future__ import annotations

import torch

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES, Run, Stage, Trajectories
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.objectives import OBJECTIVES
from cmt_fast.teacher import solver_error
from cmt_fast.teacher.pool import Pool

INDEX = {name: i for i, name in enumerate(STAGES)}  # enters every random key: never renumber


def rows(stage: Stage) -> tuple[int, int]:
    """Rows of a batch on the stage's own objective, and on its anchor."""
    anchored = round(stage.anchor.fraction * stage.batch) if stage.anchor else 0
    return stage.batch - anchored, anchored


def grad_accum_steps(run: Run, name: str, processes: int) -> int:
    """Forwards and backwards of each process in one step. Raises ConfigError where rows do not divide evenly.

    Every pass of every process takes rows of each kind in the whole batch's proportion: only then is the mean over
    parts and processes the mean over the batch.
    """
    stage = run.stage(name)
    assert stage is not None
    if stage.batch % processes:
        raise ConfigError(f"{name}.batch: {stage.batch} does not divide over {processes} processes")
    each = stage.batch // processes
    micro = stage.micro_batch or each
    if micro < each and each % micro:
        raise ConfigError(f"{name}.micro_batch: {micro} does not divide a process's {each} rows a step")
    count = max(1, each // micro)
    shards = processes * count
    own, anchored = rows(stage)
    where = f"over {count} passes of {processes} processes"
    if own % shards or anchored % shards:
        raise ConfigError(
            f"{name}.anchor.fraction: {own} rows of the objective and {anchored} of the anchor do not divide {where}"
        )
    ratio = getattr(stage.objective, "ratio", None)
    if ratio is not None and round(ratio * (own // shards)) * shards != round(ratio * own):
        with_tangents = f"{ratio} of {own} rows are {round(ratio * own)} rows with tangents"
        raise ConfigError(f"{name}.objective.ratio: {with_tangents}, which do not divide {where}")
    return count


def trajectory_rows(stage: Stage) -> int:
    """Rows of a batch that are points of teacher trajectories."""
    own, anchored = rows(stage)
    return anchored + (own if OBJECTIVES[stage.objective.kind].draws == "trajectories" else 0)


def cached(stage: Stage) -> str | None:
    """The folder that a stage's trajectories come from, None where it rolls them out or has none."""
    return stage.trajectories.cache if stage.trajectories and trajectory_rows(stage) else None


def called(stage: Stage) -> dict[str, str]:
    """As `Stage.networks`, without those that only cached trajectories were made by: what must be at hand."""
    steps = OBJECTIVES[stage.objective.kind].teacher or not cached(stage)
    return {key: name for key, name in stage.networks().items() if key == "start" or steps}


def names(run: Run) -> list[str]:
    """The stages a run has, in order."""
    return [name for name in STAGES if run.stage(name) is not None]


def pool(
    run: Run, name: str, how: Trajectories, teacher, shape: tuple[int, ...], classes: int, device, **options
) -> Pool:
    """The trajectories of a stage, rolled out as `how` says; options: as of Pool.

    Raises ValueError where batch and trajectories do not divide.
    """
    stage = run.stage(name)
    assert stage is not None
    path, rows = ProbabilityPath(run.path, run.sigma_data), trajectory_rows(stage)
    return Pool(teacher, path, how, shape, classes, rows, run.seed, INDEX[name], device, **options)


def candidates(
    run: Run, name: str, nfes: tuple[int, ...] = solver_error.NFE, grids: bool = False
) -> list[tuple[solver_error.Solver, int]]:
    """The solvers, each with a number of network calls, whose trajectories fill this stage's batches on these processes."""
    stage, found = run.stage(name), []
    assert stage is not None and stage.trajectories is not None
    for nfe in nfes:
        for setting in solver_error.settings(run.path, stage.trajectories, grids):
            how = solver_error.apply(stage.trajectories, setting, nfe)
            try:
                pool(run, name, how, None, (1,), 0, torch.device("cpu"))
            except ValueError:
                continue
            found.append((setting, nfe))
    return found
