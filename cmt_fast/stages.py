"""A stage is a row of data: this page says which rows make sense, and how long each is in steps."""

from __future__ import annotations

from typing import NamedTuple

from cmt_fast import sample
from cmt_fast.config import ConfigError
from cmt_fast.objectives import ROWS
from cmt_fast.paths import Path
from cmt_fast.schema import STAGES, Run, Stage
from cmt_fast.solvers import table
from cmt_fast.trajectories import Pool

INDEX = {name: i for i, name in enumerate(STAGES)}  # enters every random key: never renumber


class Schedule(NamedTuple):
    """A stage in optimizer steps; `*_every` 0 means never."""

    total: int
    batch: int
    warmup: int
    log_every: int
    checkpoint_every: int
    snapshot_every: int
    eval_every: int
    grid_every: int

    def lr(self, stage: Stage, step: int) -> float:
        """Learning rate of step `step`, from 0: linear warm-up, then constant or linear to zero at the end."""
        scale = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return stage.lr * scale * (1 - step / self.total if stage.lr_schedule == "linear" else 1.0)


def schedule(stage: Stage) -> Schedule:
    """Lengths in steps, rounded up; checkpoints fall on log rows, so a restart repeats whole rows."""
    total = -(-stage.images_nimg // stage.batch)
    log_every = max(1, min(total // 50, 50))  # a stop waits for a row, so rows are never far apart
    steps = lambda nimg: -(-nimg // stage.batch)
    every = lambda nimg: log_every * max(1, round(steps(nimg) / log_every)) if nimg else 0
    return Schedule(
        total,
        stage.batch,
        steps(stage.warmup_nimg),
        log_every,
        every(stage.checkpoint_every_nimg) or log_every * max(1, total // (4 * log_every)),
        every(stage.snapshot_every_nimg),
        every(stage.eval_every_nimg),
        every(stage.grid_every_nimg),
    )


def rows(stage: Stage) -> tuple[int, int]:
    """Rows of a batch on the stage's own objective, and on its anchor."""
    anchored = round(stage.anchor.share * stage.batch) if stage.anchor else 0
    return stage.batch - anchored, anchored


def passes(run: Run, name: str, processes: int) -> int:
    """Forwards and backwards of each process in one step. Raises ConfigError where rows do not divide evenly.

    Every pass of every process takes rows of each kind in the whole batch's proportion: only then is the mean over
    passes and processes the mean over the batch.
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
            f"{name}.anchor.share: {own} rows of the objective and {anchored} of the anchor do not divide {where}"
        )
    ratio = getattr(stage.objective, "ratio", None)
    if ratio is not None and round(ratio * (own // shards)) * shards != round(ratio * own):
        with_tangents = f"{ratio} of {own} rows are {round(ratio * own)} rows with tangents"
        raise ConfigError(f"{name}.objective.ratio: {with_tangents}, which do not divide {where}")
    return count


def trajectory_rows(stage: Stage) -> int:
    """Rows of a batch that are points of teacher trajectories."""
    own, anchored = rows(stage)
    return anchored + (own if ROWS[stage.objective.kind].draws == "trajectories" else 0)


def names(run: Run) -> list[str]:
    """The stages a run has, in order."""
    return [name for name in STAGES if run.stage(name) is not None]


def check(run: Run, shape: tuple[int, ...], classes: int) -> None:
    """Raises ConfigError for what each key allows by itself but not together."""
    for name in names(run):
        stage = run.stage(name)
        assert stage is not None
        _check_stage(run, name, stage, shape, classes)
    _as_config_error("sampler", lambda: sample.check(run.sampler, run.path, run.eval.steps))


def _check_stage(run: Run, name: str, stage: Stage, shape: tuple[int, ...], classes: int) -> None:
    needs = ROWS[stage.objective.kind]
    kinds = [("objective", stage.objective.kind)] + (
        [("anchor.objective", stage.anchor.objective.kind)] if stage.anchor else []
    )
    for key, kind in kinds:
        if ROWS[kind].path != run.path:
            valid = ", ".join(
                k for k, row in ROWS.items() if row.path == run.path and (key == "objective" or "cmt" in k)
            )
            raise ConfigError(
                f"{name}.{key}.kind: {kind!r} is for the path {ROWS[kind].path!r}, this run's is {run.path!r}; valid are {valid}"
            )
    for key in ("start", "teacher"):
        parent = getattr(stage, key)
        earlier = [s for s in STAGES[: INDEX[name]] if s != "control"]
        if parent and parent not in earlier:
            raise ConfigError(
                f"{name}.{key}: {parent!r} does not come before {name}; valid are {', '.join(earlier) or 'none'}"
            )
    points = trajectory_rows(stage)
    if points and not stage.trajectories:
        raise ConfigError(
            f"{name}.trajectories: is missing, {' and '.join(k for _, k in kinds)} draw from the teacher's trajectories"
        )
    if (points or needs.teacher) and not stage.teacher:
        raise ConfigError(f"{name}.teacher: is missing; it names the stage whose network is the teacher")
    if not rows(stage)[0] or (stage.anchor and not rows(stage)[1]):
        raise ConfigError(
            f"{name}.anchor.share: {stage.anchor and stage.anchor.share} leaves no row of the batch of {stage.batch} to one side"
        )
    if (
        stage.label_dropout or stage.teacher_guidance != 1 or (stage.trajectories and stage.trajectories.guidance != 1)
    ) and not classes:
        raise ConfigError(f"{name}: label_dropout and guidance need class labels, and this data has none")
    if getattr(stage.objective, "distance", "") == "features" and (not classes or len(shape) == 1):
        raise ConfigError(
            f"{name}.objective.distance: 'features' needs labelled images to train the feature network on"
        )
    if stage.trajectories and points:
        t = stage.trajectories
        _as_config_error(
            f"{name}.trajectories", lambda: table(Path(run.path), t.solver, t.nfe, t.t_max, t.t_min, t.order, t.shift)
        )
        _as_config_error(name, lambda: pool(run, name, None, shape, classes, "cpu"))


def pool(run: Run, name: str, teacher, shape: tuple[int, ...], classes: int, device) -> Pool:
    """The trajectories of a stage. Raises ValueError where batch and trajectories do not divide."""
    stage = run.stage(name)
    assert stage is not None and stage.trajectories is not None
    return Pool(
        teacher,
        Path(run.path, run.sigma_data),
        stage.trajectories,
        shape,
        classes,
        trajectory_rows(stage),
        run.seed,
        INDEX[name],
        device,
    )


def _as_config_error(key: str, call) -> None:
    try:
        call()
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(
            text if text.startswith(key) else f"{key}.{text}" if ":" in text.split(" ")[0] else f"{key}: {text}"
        ) from None
